"""Evaluate a model on text: loss per token, perplexity and bits per byte.

python -m pretrain.evaluate runs/x --text book.txt reads the text in windows as long as the model's training sequences;
each token but the first is a target once. --data evaluates on a prepared dataset instead.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from pretrain.cli import console
from pretrain.cli.arguments import number
from pretrain.cli.errors import clear_errors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pretrain.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", help="a run's folder, one of its checkpoints, or a Hugging Face LLaMA folder")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="PATH", help="files, folders and globs of text")
    source.add_argument("--data", metavar="FOLDER", help="the folder of a prepared dataset (prepared/…)")
    p.add_argument(
        "--patterns", nargs="+", default=["*.txt", "*.md", "*.py"],
        help="files taken from folders of text (default: *.txt *.md *.py)",
    )  # fmt: skip
    p.add_argument("--split", default="val", choices=("val", "train"), help="split of the dataset (default: val)")
    p.add_argument("--seq-len", type=number(int, 1), help="tokens in a window (default: as in training)")
    p.add_argument("--batch-size", type=number(int, 1), default=8, help="windows at once (default: 8)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    with clear_errors():
        args = parser().parse_args(arguments)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        result = _evaluate(args)
        print(json.dumps(result) if args.json else _as_text(result))


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The scores of the model on the text in ``args``, and the counts of its tokens and bytes."""
    # Imported here, because importing torch takes seconds: not for --help.
    from data.loading.batches import validation_batches
    from data.token_dataset import load as load_dataset
    from pretrain.distributed.world import World
    from pretrain.inference.pretrained import find_pretrained
    from pretrain.training.validation import evaluate, tokenize_files

    dataset = load_dataset(args.data) if args.data else None
    found = find_pretrained(args.model)
    model, tokenizer = found.load()
    tokens: Any
    if dataset:
        if dataset.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"--data: {args.data} was made with another tokenizer than {args.model}'s; use --text")
        tokens = getattr(dataset, args.split)
    else:
        tokens = tokenize_files(args.text, args.patterns, tokenizer)
    seq_len, longest = args.seq_len or found.seq_len, model.max_position_embeddings
    if seq_len > longest:
        raise ValueError(f"--seq-len={seq_len} is more than the {longest} positions of {args.model}; lower it")
    world = World(rank=0, size=1, device=model.embed_tokens.weight.device)
    batches = validation_batches(tokens, seq_len, args.batch_size)
    score = evaluate(model, batches, tokenizer, world)
    metrics = {name.removeprefix("val/"): value for name, value in score.metrics.items()}
    return {**metrics, "tokens": score.tokens, "bytes": score.text_bytes, "seq_len": seq_len}


def _as_text(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"{result['tokens']:,} tokens of {result['bytes']:,} bytes, {result['seq_len']} at a time",
            f"loss           {result['loss']:.4f} nats per token",
            f"perplexity     {console.number(result['perplexity'], '1e6')}",
            f"bits per byte  {result['bits_per_byte']:.4f}",
        ]
    )


if __name__ == "__main__":
    main()
