"""Generate text with a trained model, token by token, with a cache of keys and values.

python -m pretrain.generate runs/x --prompt "…" prints tokens as they are generated. --page serves a web page instead,
whose form starts with the values of the other options.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pretrain.cli.arguments import number
from pretrain.cli.errors import clear_errors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pretrain.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    p.add_argument("model", help="a run's folder, one of its checkpoints, or a Hugging Face LLaMA folder")
    p.add_argument("--prompt", default="", help="the text to continue (default: none)")
    p.add_argument("--tokens", type=number(int, 1), default=200, help=f"maximum number of tokens {default}")
    p.add_argument("--temperature", type=number(float, 0), default=0.8, help=f"0 takes the most likely token {default}")
    p.add_argument(
        "--top-k", type=number(int, 0), default=50, help=f"number of most likely tokens to draw from; 0: all {default}"
    )
    p.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        default=1.0,
        help=f"draw from the most likely tokens that have this total probability {default}",
    )
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    seed_help = "seed of the sampling (default: 0; with --page a random seed for each text)"
    p.add_argument("--seed", type=int, help=seed_help)
    p.add_argument("--page", action="store_true", help="serve a page with a form for prompts, on this machine only")
    p.add_argument("--port", type=number(int, 1, 65535), default=8000, help=f"port of the page {default}")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    with clear_errors():
        args = parser().parse_args(arguments)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        if args.page:
            _serve(args)
            return
        speed = _generate(args)
        print()
    print(speed, file=sys.stderr)


def _generate(args: argparse.Namespace) -> str:
    """Print the text; returns its length and speed."""
    _, generator, sampling = _load(args)
    pieces = generator.stream(args.prompt, args.tokens, sampling, args.stop)
    first = next(pieces, "")  # before the prompt is printed, so that warnings of the model come first
    for piece in chain([args.prompt, first], pieces):
        print(piece, end="", flush=True)
    return generator.speed


def _serve(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    try:
        from pretrain.inference.page import make_app, serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--page needs {error.name}, which is not installed; run .venv/bin/pip install -r requirements-extra.txt"
        ) from None
    path, generator, sampling = _load(args)
    path = path.resolve()
    step = path.name.removeprefix("step-")
    name = f"{path.parent.parent.name}, step {int(step):,}" if step != path.name else path.name
    logging.getLogger("waitress").setLevel(logging.WARNING)
    app = make_app(generator, name, sampling, prompt=args.prompt, tokens=args.tokens, stops=args.stop, seed=args.seed)
    serve(app, args.port)


def _load(args: argparse.Namespace) -> tuple[Path, Any, Any]:
    """The path of the model, its TextGenerator, and the Sampling given by the options."""
    from pretrain.inference.pretrained import find_pretrained  # torch takes seconds to import: not for --help
    from pretrain.inference.sampling import Sampling
    from pretrain.inference.text_generator import TextGenerator

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed or 0)
    found = find_pretrained(args.model)
    return found.path, TextGenerator(*found.load(), found.end_ids()), sampling


if __name__ == "__main__":
    main()
