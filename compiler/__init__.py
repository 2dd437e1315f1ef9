"""Ahead of time: from a checkpoint to a bundle of engines. Needs ``qie[compile]``; never torch, except in reference.py."""
