"""Weights as names into the checkpoint, quantized and streamed one tensor at a time."""
