"""Text in, batches of tokens out: sources, tokenizer, preparation into token shards, loader."""
