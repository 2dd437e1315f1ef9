"""How long the stages of an edit take, and whether that is longer than it was."""
