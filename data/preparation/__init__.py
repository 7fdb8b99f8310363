"""Turning a corpus into token shards."""
