"""How well a model predicts a text: token-weighted loss, perplexity and bits per byte, summed over processes.

python -m pretrain.evaluate runs/x --text book.txt reads the text in windows of the length that the model was trained
on, each token but the first a target once; --data takes a prepared folder instead.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.loading.batches import validation_batches
from data.sources.files import text_files
from data.sources.records import read_documents
from data.token_dataset import load as load_prepared
from data.tokenizer import Tokenizer
from pretrain.distributed.world import World
from pretrain.inference.scoring import Score, evaluate

logger = logging.getLogger(__name__)


def read_text(paths: Sequence[str], patterns: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens (n,) int32 of the documents at ``paths``, each between bos and eos as in a preparation.

    Raises:
        ValueError: a path that leads to nothing, or no readable text.
    """
    skipped: dict[str, list[str]] = {}
    documents = list(read_documents(text_files(paths, patterns, max_bytes=2**63), skipped))
    for reason, names in skipped.items():
        logger.warning("skipped, %s: %s", reason, ", ".join(names))
    if not documents:
        raise ValueError(f"--text: no readable text in {', '.join(paths)}")
    texts = tokenizer.encode_batch([document.text for document in documents])
    return np.concatenate([np.r_[tokenizer.bos_id, tokens, tokenizer.eos_id] for tokens in texts])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description=__doc__)
    p.add_argument("model", help="a run's folder, one of its checkpoints, or an exported or Hugging Face LLaMA folder")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="PATH", help="files, folders and globs of text")
    what.add_argument("--data", metavar="FOLDER", help="a prepared folder (prepared/…)")
    p.add_argument("--patterns", nargs="+", default=["*.txt", "*.md", "*.py"], help="files taken from folders of text")
    p.add_argument("--split", default="val", choices=("val", "train"), help="of the prepared folder (default: val)")
    p.add_argument("--seq-len", type=int, help="tokens seen at once; by default as in training")
    p.add_argument("--batch-size", type=int, default=8, help="sequences at once (default: 8)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    from pretrain.cli.errors import clear_errors
    from pretrain.inference.pretrained import find_pretrained, load_pretrained

    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with clear_errors():
        model, tokenizer = load_pretrained(args.model)
        tokens: Any
        if args.data:
            prepared = load_prepared(args.data)
            if prepared.tokenizer.sha256 != tokenizer.sha256:
                raise ValueError(f"--data: {args.data} was made with another tokenizer than {args.model}'s; use --text")
            tokens = getattr(prepared, args.split)
        else:
            tokens = read_text(args.text, args.patterns, tokenizer)
        seq_len = args.seq_len or find_pretrained(args.model).seq_len
        world = World(rank=0, size=1, device=model.embed_tokens.weight.device)
        token_bytes = torch.as_tensor(tokenizer.token_bytes, dtype=torch.int64, device=world.device)
        score = evaluate(model, validation_batches(tokens, seq_len, args.batch_size), token_bytes, world)
    print(json.dumps(_as_dict(score, seq_len)) if args.json else _as_text(score, seq_len))


def _as_dict(score: Score, seq_len: int) -> dict[str, Any]:
    plain = {name.removeprefix("val/"): value for name, value in score.metrics.items()}
    counts = {"tokens": score.tokens, "bytes": score.text_bytes, "seq_len": seq_len}
    return {**plain, **counts, "as_peers_print": score.as_peers_print}


def _as_text(score: Score, seq_len: int) -> str:
    plain, peers = score.metrics, score.as_peers_print
    return "\n".join(
        [
            f"{score.tokens:,} tokens of {score.text_bytes:,} bytes, {seq_len} at a time",
            f"loss           {plain['val/loss']:.4f} nats a token",
            f"perplexity     {plain['val/perplexity']:.3f}",
            f"bits per byte  {plain['val/bits_per_byte']:.4f}",
            f"as GaLore's and its relatives' code prints it, divided by {score.batches + 1} instead of {score.batches} "
            f"batches: loss {peers['loss']:.4f}, perplexity {peers['perplexity']:.3f}",
        ]
    )


if __name__ == "__main__":
    main()
