"""The faults, a file per place: each has them as a literal dict by name."""
