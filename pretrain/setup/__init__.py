"""Checks and construction of the objects of a run."""
