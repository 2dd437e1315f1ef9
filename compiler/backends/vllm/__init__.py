"""Builder for vLLM, and the text encoder as it reads it."""
