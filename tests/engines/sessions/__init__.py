"""Tests of the sessions; a package, so that a file may have the name of a builder's test."""
