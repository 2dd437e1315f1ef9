"""Schemes, Q/DQ rewriting and smoothing, and the calibration that they need."""
