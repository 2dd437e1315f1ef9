"""TensorRT-LLM 1.2.1, for the language model: its checkpoint format, its model class and its build command."""
