"""Trained models: loading, sampling, scoring."""
