"""Sample the tokens that follow a prompt."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from models.kv_cache import KVCache
from models.llama import Llama


@dataclass(frozen=True)
class Sampling:
    """Options for sampling tokens. For equal options and logits, the samples are equal.

    ``temperature`` divides the logits; 0 always takes the most likely token. ``top_k`` keeps this number of most likely
    tokens; 0 keeps all. Among these, ``top_p`` keeps the most likely tokens that together reach this probability
    (Holtzman et al., arXiv 1904.09751).

    Raises:
        ValueError: values out of range, one line per value.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        checks = [
            (self.temperature >= 0, f"temperature={self.temperature} must be at least 0"),
            (self.top_k >= 0, f"top_k={self.top_k} must be at least 0"),
            (0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0 and at most 1"),
        ]
        if problems := [message for holds, message in checks if not holds]:
            raise ValueError("\n".join(problems))

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (n,) and token ids (n,) of the ``top_k`` most likely tokens, from float logits (rows,).

        A token that ``top_p`` excludes has probability 0. Not for temperature 0.
        """
        best, tokens = logits.topk(min(self.top_k or logits.numel(), logits.numel()))
        p = (best / self.temperature).softmax(-1)
        p = p * (p.cumsum(-1) - p < self.top_p)
        return p / p.sum(), tokens

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """The id of one token, drawn with ``generator`` from float logits (rows,) on the CPU."""
        if self.temperature == 0:
            return int(logits.argmax())
        p, tokens = self.probabilities(logits)
        return int(tokens[torch.multinomial(p, 1, generator=generator)])


def rows_without_token(tokenizer: Tokenizer, rows: int, ends: Collection[int] = ()) -> Tensor:
    """For each of a model's ``rows`` embedding rows, whether it has no token, as bool (rows,).

    Such rows are padding after the vocabulary, or gaps in it. ``ends`` are tokens even if they are not in the
    tokenizer's file: a sentencepiece model lacks tokens that were added later.
    """
    return torch.tensor([not (tokenizer.has(row) or row in ends) for row in range(rows)])


def new_tokens(
    model: Llama, prompt: Sequence[int], sampling: Sampling, never: Tensor | None = None, use_cache: bool = True
) -> Iterator[int]:
    """Yield the ids of tokens that follow ``prompt``, without end.

    When all positions of the model are used, generation continues from the latest tokens only: half as many as
    positions.

    Args:
        prompt: the ids of one token or more.
        never: bool (rows,) on the CPU, true for tokens that are never generated, such as ``rows_without_token``.
        use_cache: keep the keys and values of earlier tokens; False computes them again for each new token.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    device, positions = model.embed_tokens.weight.device, model.max_position_embeddings
    ids, start, caches = list(prompt), 0, None
    while True:
        if len(ids) - start > positions:
            start, caches = len(ids) - max(1, positions // 2), None
        if caches is None and use_cache:
            caches = [KVCache(positions) for _ in model.layers]
        seen = caches[0].tokens if caches else 0
        with torch.no_grad():  # not around the yield, where it would also apply to the caller
            logits = model(torch.tensor([ids[start + seen :]], device=device), caches=caches)[0, -1]
        logits = logits.float().cpu()
        ids.append(sampling.draw(logits if never is None else logits.masked_fill(never, -torch.inf), generator))
        yield ids[-1]


def generate(
    model: Llama, prompt: Sequence[int], tokens: int, *, temperature: float, top_k: int, seed: int,
    top_p: float = 1.0, ends: Collection[int] = (), never: Tensor | None = None, use_cache: bool = True,
) -> list[int]:  # fmt: skip
    """The ids of ``prompt`` and of up to ``tokens`` new tokens, which end before the first token in ``ends``.

    ``temperature``, ``top_k``, ``seed`` and ``top_p`` are explained in ``Sampling``, and ``never`` in ``new_tokens``.

    Args:
        prompt: the ids of one token or more; bos is not added.
        use_cache: keep the keys and values of earlier tokens; False computes them again for each new token.

    Raises:
        ValueError: a sampling option is out of range.
    """
    ids = list(prompt)
    following = new_tokens(model, prompt, Sampling(temperature, top_k, top_p, seed), never, use_cache)
    for _, token in zip(range(tokens), following, strict=False):
        if token in ends:
            break
        ids.append(token)
    return ids
