"""Optimizers, row selection, the fold and refresh of Grass, and schedules, for models and tensors only."""
