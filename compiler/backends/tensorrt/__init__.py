"""Engines of TensorRT and TensorRT for RTX, compiled in a process of their own."""
