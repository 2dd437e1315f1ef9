"""The builder for TensorRT and TensorRT for RTX, which compiles each engine in a separate process."""
