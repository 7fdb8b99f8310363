"""Command-line helpers; importing them does not import torch."""
