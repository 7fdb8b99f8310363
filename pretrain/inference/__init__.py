"""Trained models: loading and sampling."""
