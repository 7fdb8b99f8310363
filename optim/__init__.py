"""Optimizers, row selection, the fold and refresh of Grass, and schedules; independent of the package pretrain."""
