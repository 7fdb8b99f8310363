"""Measurements that need a GPU: ``python -m benchmarks.gpu``, described in docs/gpu.md."""
