"""Score text: loss, perplexity, bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.distributed.world import World


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
