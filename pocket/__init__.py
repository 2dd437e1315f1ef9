"""How the pocket model is made: its training data, its modules, their training, calibration and evaluation.

Not part of the wheel.
"""
