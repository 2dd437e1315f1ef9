"""How the pocket model is made: what it learns from, what it learns, and the training itself. Not part of the wheel."""
