"""The language model as TensorRT-LLM executes it."""
