"""The reference that engines are compared with, and the metrics of the comparison."""
