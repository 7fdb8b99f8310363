"""How well a model predicts a text: token-weighted loss, perplexity and bits per byte, summed over processes.

python -m pretrain.evaluate runs/x --text book.txt reads the text in windows of the length that the model was trained
on, each token but the first a target once; --data takes a prepared folder instead.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.loader import validation_batches
from data.prepare import load as load_prepared
from data.records import read_documents
from data.sources import text_files
from data.tokenizer import Tokenizer
from pretrain.distributed import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """Sums over the targets of a text: loss in nats, number of tokens, number of UTF-8 bytes they stand for.

    ``batch_means`` is the sum over ``batches`` of each one's mean loss, for ``as_peers_print``.
    """

    nats: float
    tokens: int
    text_bytes: int
    batch_means: float = 0.0
    batches: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        loss = self.nats / self.tokens
        return {
            "val/loss": loss,
            "val/perplexity": _perplexity(loss),
            "val/bits_per_byte": self.nats / math.log(2) / self.text_bytes,
        }

    @property
    def as_peers_print(self) -> dict[str, float]:
        """What GaLore's ``evaluate_model``, and the many copies of it, call the loss of these batches.

        They start their count of batches at 1 and so divide the n batches' means by n + 1: a few percent too low.
        """
        loss = self.batch_means / (self.batches + 1)
        return {"loss": loss, "perplexity": _perplexity(loss), "batches": self.batches}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], token_bytes: Tensor, world: World) -> Score:
    """The score of ``model`` on ``batches`` of what it takes, inputs and targets first; each process brings its own.

    Args:
        token_bytes: (vocab,) int64, the UTF-8 bytes that each token stands for.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    model.eval()
    for batch in batches:
        input_ids, targets, *documents = (tensor.to(world.device) for tensor in batch)
        real, nats = targets[targets != -100], model(input_ids, targets, *documents).double()
        if real.numel():
            ones = [nats, real.numel(), token_bytes[real].sum(), nats / real.numel(), 1]
            sums += torch.stack([torch.as_tensor(one, dtype=torch.float64, device=world.device) for one in ones])
    model.train()
    nats, tokens, text_bytes, means, count = world.sum(sums).tolist()
    return Score(nats, int(tokens), int(text_bytes), means, int(count))


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
    from pretrain.preflight import clear_errors
    from pretrain.trained import find_trained, load_trained

    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with clear_errors():
        model, tokenizer = load_trained(args.model)
        tokens: Any
        if args.data:
            prepared = load_prepared(args.data)
            if prepared.tokenizer.sha256 != tokenizer.sha256:
                raise ValueError(f"--data: {args.data} was made with another tokenizer than {args.model}'s; use --text")
            tokens = getattr(prepared, args.split)
        else:
            tokens = read_text(args.text, args.patterns, tokenizer)
        seq_len = args.seq_len or find_trained(args.model).seq_len
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
