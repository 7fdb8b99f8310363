"""Plan the memory of a run without allocating it."""
