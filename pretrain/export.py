"""Export a model in Hugging Face's format, for transformers and other programs that read this format.

python -m pretrain.export runs/x --out folder writes config.json, generation_config.json, the weights as safetensors
and the tokenizer. The optimizer's state is left out.
"""

import argparse
import logging
from collections.abc import Sequence

from pretrain.cli.arguments import number
from pretrain.cli.errors import clear_errors
from pretrain.config.schema import DTYPE_NAMES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pretrain.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", help="a run's folder, one of its checkpoints, or a Hugging Face LLaMA folder")
    p.add_argument("--out", required=True, help="the folder to write, which must not exist")
    p.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype of the weights (default: that of the model)")
    p.add_argument(
        "--shard-gb",
        type=number(float, 0, above=True),
        default=5.0,
        help="maximum size of a file of weights in GB (default: %(default)g)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    with clear_errors():
        args = parser().parse_args(arguments)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        from models.precision import DTYPES  # imports torch, which takes seconds: not for --help
        from pretrain.inference.hf_export import export

        export(args.model, args.out, DTYPES[args.dtype] if args.dtype else None, int(args.shard_gb * 1e9))


if __name__ == "__main__":
    main()
