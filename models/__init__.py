"""The networks: plain `nn.Module`s that take keyword arguments, do no I/O and know no config objects."""
