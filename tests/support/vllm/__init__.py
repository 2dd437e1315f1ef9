"""A stand-in of vLLM, as package and as server, that computes with the engines of a bundle for the CPU."""
