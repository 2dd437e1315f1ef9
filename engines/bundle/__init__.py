"""Bundles: the manifest, the folder, and the model's constants that it holds."""
