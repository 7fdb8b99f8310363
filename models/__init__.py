"""The networks: plain `nn.Module`s with keyword arguments, without I/O and config objects."""
