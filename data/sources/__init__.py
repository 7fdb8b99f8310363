"""Corpus sources: files, records, token files, datasets."""
