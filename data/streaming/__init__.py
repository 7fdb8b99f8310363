"""Train while the corpus is still being prepared."""
