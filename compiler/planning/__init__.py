"""What a build makes, whether it fits, and what it costs."""
