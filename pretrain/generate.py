"""Generate text with a trained model, token by token, with a cache of keys and values.

python -m pretrain.generate runs/x --prompt "…" writes it to the terminal as it comes; --page serves a web page instead.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from itertools import chain

from pretrain.cli.errors import clear_errors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pretrain.generate", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("model", help="a run's folder, one of its checkpoints, or a Hugging Face LLaMA folder")
    p.add_argument("--prompt", default="", help="the text to continue")
    p.add_argument("--tokens", type=int, default=200, help="the most tokens to generate")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    p.add_argument("--top-k", type=int, default=50, help="draw from this many of the likeliest tokens; 0: from all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total probability")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--seed", type=int, default=0, help="of the draws")
    p.add_argument("--page", action="store_true", help="serve a page to type prompts into, to this machine only")
    p.add_argument("--port", type=int, default=8000, help="of the page")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with clear_errors():
        speed = _generate(args)
    print()
    print(speed, file=sys.stderr)


def _generate(args: argparse.Namespace) -> str:
    """Print the text, or serve the page; returns the length and speed of the text."""
    from pretrain.inference.pretrained import find_pretrained  # torch takes seconds to import: not for --help
    from pretrain.inference.sampling import Sampling
    from pretrain.inference.text_generator import TextGenerator

    sampling, found = Sampling(args.temperature, args.top_k, args.top_p, args.seed), find_pretrained(args.model)
    generator = TextGenerator(*found.load(), found.end_ids())
    if args.page:
        from pretrain.inference.page import serve

        serve(generator, args.port)
    pieces = generator.stream(args.prompt, args.tokens, sampling, args.stop)
    first = next(pieces, "")  # before the prompt is printed, so that warnings of the model come ahead of both
    for piece in chain([args.prompt, first], pieces):
        print(piece, end="", flush=True)
    return generator.speed


if __name__ == "__main__":
    main()
