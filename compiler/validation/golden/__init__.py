"""Golden files: what the reference computed for a set of cases, recorded once, for validation without torch."""
