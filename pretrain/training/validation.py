"""The validation loss of a model, its perplexity and bits per byte, over the batches of all processes."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.sources.files import text_files
from data.sources.records import read_documents
from data.tokenizer import Tokenizer
from pretrain.distributed.world import World

logger = logging.getLogger(__name__)

LARGEST_EXPONENT = 700.0  # exp() of it is finite in float64


@dataclass(frozen=True)
class Score:
    """Sums over the targets of a text: the loss in nats, the number of tokens, and the number of UTF-8 bytes."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def metrics(self) -> dict[str, float]:
        """``val/loss`` in nats per token, ``val/perplexity`` (its exponential), and ``val/bits_per_byte``."""
        loss = self.nats / self.tokens
        return {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
            "val/bits_per_byte": self.nats / math.log(2) / self.text_bytes,
        }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], tokenizer: Tokenizer, world: World) -> Score:
    """The score of ``model``, summed over the batches of all processes. Leaves the model in train mode.

    Args:
        batches: this process' arguments of the model: inputs (b, t) and targets (b, t), int64, -100 for no target; and
            the starts of documents, if a token attends only to its own document.
        tokenizer: counts the UTF-8 bytes of targets. A space that it puts before every text, after bos, is not counted.
    """
    token_bytes = torch.as_tensor(tokenizer.token_bytes, dtype=torch.int64, device=world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    model.eval()
    for batch in batches:
        input_ids, targets, *documents = (tensor.to(world.device) for tensor in batch)
        real, nats = targets[targets != -100], model(input_ids, targets, *documents).double()
        if real.numel():
            text_bytes = token_bytes[real].sum()
            if tokenizer.space_after is not None:
                first = targets[(input_ids == tokenizer.space_after) & (targets != -100)]
                text_bytes -= (token_bytes[first] > 0).sum()  # excludes eos, if eos and bos are the same token
            parts = [nats, real.numel(), text_bytes]
            sums += torch.stack([torch.as_tensor(part, dtype=torch.float64, device=world.device) for part in parts])
    model.train()
    nats, tokens, text_bytes = world.sum(sums).tolist()
    return Score(nats, int(tokens), int(text_bytes))


def tokenize_files(paths: Sequence[str], patterns: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of the documents at ``paths``, int32 (n,), each document between bos and eos.

    Args:
        paths: files, folders and globs.
        patterns: globs for the names of files to take from folders.

    Raises:
        ValueError: a path does not exist, or there is no readable text.
    """
    skipped: dict[str, list[str]] = {}
    documents = list(read_documents(text_files(paths, patterns, max_bytes=2**63, key="--text"), skipped))
    for reason, names in skipped.items():
        logger.warning("skipped, %s: %s", reason, ", ".join(names))
    if not documents:
        raise ValueError(f"--text: no readable text in {', '.join(paths)}; name other files, or change --patterns")
    texts = tokenizer.encode_batch([document.text for document in documents])
    return np.concatenate([np.r_[tokenizer.bos_id, tokens, tokenizer.eos_id] for tokens in texts])
