"""What differs between two bundles: records, layers and kernels, graphs and weights, velocities."""
