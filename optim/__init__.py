"""Optimizers, learning-rate schedules, and the optimizer part of Grass; independent of the package pretrain."""
