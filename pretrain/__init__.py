"""The training run: configuration, the loop, checkpoints, metrics, and the commands around it."""
