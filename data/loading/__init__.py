"""Training and validation batches from a prepared dataset."""
