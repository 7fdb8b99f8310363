"""LLaMA and the layers of Grass: plain PyTorch modules and functions that read no files and no configuration."""
