"""Validation: token-weighted loss over a split, summed over processes, as loss, perplexity and bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.distributed import World


@dataclass(frozen=True)
class Score:
    """Sums over the targets of a text: loss in nats, number of tokens, number of UTF-8 bytes they stand for."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def metrics(self) -> dict[str, float]:
        loss = self.nats / self.tokens
        return {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/bits_per_byte": self.nats / math.log(2) / self.text_bytes,
        }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor, world: World) -> Score:
    """The score of ``model`` on ``batches`` of (input_ids, targets), each process bringing its own.

    Args:
        token_bytes: (vocab,) int64, the UTF-8 bytes that each token stands for.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    model.eval()
    for input_ids, targets in batches:
        input_ids, targets = input_ids.to(world.device), targets.to(world.device)
        real = targets[targets != -100]
        sums[0] += model(input_ids, targets)
        sums[1] += real.numel()
        sums[2] += token_bytes[real].sum()
    model.train()
    nats, tokens, text_bytes = world.sum(sums).tolist()
    return Score(nats, int(tokens), int(text_bytes))
