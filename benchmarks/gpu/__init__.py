"""What only a machine with a GPU can tell of this project: ``python -m benchmarks.gpu``, described in docs/gpu.md."""
