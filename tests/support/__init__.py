"""What tests share: checkpoints, images, bundles, metrics, and a GPU made of Python."""
