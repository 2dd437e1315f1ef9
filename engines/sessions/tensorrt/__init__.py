"""TensorRT and TensorRT for RTX: a session, the contract of its engine, and the cache of its kernels."""
