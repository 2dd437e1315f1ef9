"""The language model for TensorRT-LLM: its checkpoint format, the program that builds, and the engine that follows."""
