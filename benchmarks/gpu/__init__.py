"""The GPU benchmark, ``python -m benchmarks.gpu``. docs/gpu.md describes it."""
