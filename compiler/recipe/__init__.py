"""Recipes: one TOML file that says everything about a build for one GPU."""
