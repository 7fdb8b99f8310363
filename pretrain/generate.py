"""Text from a trained model: sampled one token at a time, each from the keys and values that are kept of those before.

python -m pretrain.generate runs/x --prompt "…" writes it to the terminal as it comes; --page serves a page instead.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from itertools import chain

from pretrain.cli.errors import clear_errors
from pretrain.inference.pretrained import load_pretrained
from pretrain.inference.sampling import Sampling, Writer

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pretrain.generate", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("model", help="a run's folder, one of its checkpoints, or an exported or Hugging Face LLaMA folder")
    p.add_argument("--prompt", default="", help="what to continue")
    p.add_argument("--tokens", type=int, default=200, help="how many to write at the most")
    p.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 takes the likeliest token")
    p.add_argument("--top-k", type=int, default=Sampling.top_k, help="draw from that many of the likeliest, 0: all")
    p.add_argument("--top-p", type=float, default=Sampling.top_p, help="draw from the likeliest of this probability")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--seed", type=int, default=Sampling.seed, help="of the draws")
    p.add_argument("--page", action="store_true", help="serve a page to type into, on this machine alone")
    p.add_argument("--port", type=int, default=8000, help="of the page")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with clear_errors():
        writer = Writer(*load_pretrained(args.model))
        if args.page:
            from pretrain.inference.page import serve

            serve(writer, args.port)
            return
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        pieces = writer.write(args.prompt, args.tokens, sampling, args.stop)
        first = next(pieces, "")  # before the prompt is shown: what the model has to say of itself comes ahead of both
        for piece in chain([args.prompt, first], pieces):
            print(piece, end="", flush=True)
    print()
    print(writer.speed, file=sys.stderr)


if __name__ == "__main__":
    main()
