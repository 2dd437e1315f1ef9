"""A plan carried out: engines, weights and manifest in a folder that is whole or absent."""
