"""Training data: images, instructions and the exact result of each."""
