"""How well models repeat what they have just read.

python -m benchmarks.repetition --data prepared/text-bd03429c3273 runs/quality/c/*/

Each model reads half a window of validation text twice in a row. Models learn at some moment of their training to copy
from their context (induction heads, arXiv 2209.11895), and the loss of the second reading then falls far below that of
the first. Two short runs whose final losses differ may differ only in whether that moment has come.
"""

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from data.token_dataset import load as load_dataset
from models.llama import Llama
from pretrain.cli.arguments import number
from pretrain.cli.errors import clear_errors
from pretrain.inference.pretrained import find_pretrained


def repeated(tokens: np.ndarray, windows: int, half: int, seed: int = 0) -> Tensor:
    """Return token ids (windows, 2 × half) int64: in each row, a random stretch of ``half`` tokens, twice."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - half + 1, windows)
    return torch.from_numpy(np.stack([tokens[s : s + half] for s in starts]).astype(np.int64)).repeat(1, 2)


@torch.no_grad()
def losses(model: Llama, ids: Tensor) -> tuple[float, float]:
    """Return the mean losses of the first and of the second reading, in nats per token.

    The first token of each reading does not count, because it cannot be predicted.

    Args:
        ids: token ids (windows, 2 × half) int64, as from ``repeated``.
    """
    half = ids.shape[1] // 2
    logits = model(ids[:, :-1]).float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return loss[:, : half - 1].mean().item(), loss[:, half:].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="model", help="folders of runs, or Hugging Face LLaMA folders")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="the prepared folder of their text")
    parser.add_argument("--windows", type=number(int, 1), default=64, help="stretches of text (default 64)")
    arguments = parser.parse_args()
    with clear_errors():
        dataset = load_dataset(arguments.data)
        text = dataset.val[0 : len(dataset.val)]
        table = Table("model", "first reading", "second reading")
        for folder in track(arguments.models, console=Console(stderr=True), transient=True):
            found = find_pretrained(folder)
            model, tokenizer = found.load()
            if tokenizer.sha256 != dataset.tokenizer.sha256:
                raise ValueError(f"--data: {arguments.data} was made with another tokenizer than {folder}'s")
            if len(text) < found.seq_len // 2:
                raise ValueError(f"--data: {arguments.data} has too little validation text for {folder}'s window")
            first, second = losses(model, repeated(text, arguments.windows, found.seq_len // 2))
            table.add_row(str(folder), f"{first:.3f}", f"{second:.3f}")
        Console().print(table)


if __name__ == "__main__":
    main()
