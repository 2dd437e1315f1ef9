"""Distances between a result and what it should be; no verdicts."""
