"""The reference and the metrics by which engines are judged."""
