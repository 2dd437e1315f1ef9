"""Faults of bundles and of code, and what ``qie validate`` must say of each."""
