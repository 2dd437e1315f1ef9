"""Checkpoints of the real architecture with made-up weights, of any size."""
