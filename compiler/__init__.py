"""Ahead of time: from a checkpoint to a bundle of engines. Needs ``qie[compile]``; torch in reference.py alone."""
