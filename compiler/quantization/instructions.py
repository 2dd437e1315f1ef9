"""The built-in instructions of calibration samples: light, because the help of `qie calibrate` counts them."""

__all__ = ["INSTRUCTIONS"]

INSTRUCTIONS = (
    "make it grayscale",
    "change the background to a beach at sunset",
    "put a red hat on the person",
    "turn it into a watercolor painting",
    "remove the text",
    "make it night",
    "add a small dog on the left",
    'write "OPEN" on the sign',
)
"""Instructions of many kinds, for a calibration without instructions of its own."""
