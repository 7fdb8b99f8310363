"""From text to batches of tokens: sources, tokenizer, preparation into token shards, loading."""
