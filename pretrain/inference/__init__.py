"""Trained models: loading, sampling and export."""
