"""Turn a corpus into token shards."""
