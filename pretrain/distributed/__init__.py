"""Ranks, engines (DDP, FSDP2, HSDP) and lost ranks."""
