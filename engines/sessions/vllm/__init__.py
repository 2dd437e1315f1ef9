"""Sessions of vLLM: the text encoder in this process, or the language model on a server."""
