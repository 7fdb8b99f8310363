"""Measurements that need a GPU. Run ``python -m benchmarks.gpu``; docs/gpu.md describes it."""
