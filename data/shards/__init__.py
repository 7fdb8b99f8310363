"""Read and write token shards."""
