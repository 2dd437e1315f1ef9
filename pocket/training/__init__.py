"""The training of the VAE, the text encoder and the transformer: ``python -m pocket.training.NAME FOLDER``."""
