"""Generate text from a model, token by token."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from models.kv_cache import KVCache
from models.llama import Llama


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the draws are a function of ``seed`` alone.

    temperature divides the logits, 0 takes the likeliest token; top_k keeps that many of the likeliest tokens, 0 all;
    top_p keeps the likeliest ones that together reach this probability (Holtzman et al., arXiv 1904.09751).
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
        """(n,) probabilities of the tokens that may be drawn, and those tokens, from logits (vocab,)."""
        best, tokens = logits.topk(min(self.top_k or logits.numel(), logits.numel()))
        p = (best / self.temperature).softmax(-1)
        p = p * (p.cumsum(-1) - p < self.top_p)
        return p / p.sum(), tokens

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        p, tokens = self.probabilities(logits)
        return int(tokens[torch.multinomial(p, 1, generator=generator)])


def new_tokens(model: Llama, prompt: Sequence[int], sampling: Sampling, use_cache: bool = True) -> Iterator[int]:
    """The tokens that follow ``prompt``, without end.

    When the model's positions are used up, all but the latest half of them is forgotten.
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
        with torch.no_grad():  # not around the yield: it would hold for whoever asks for the tokens
            logits = model(torch.tensor([ids[start + seen :]], device=device), caches=caches)[0, -1]
        ids.append(sampling.draw(logits.float().cpu(), generator))
        yield ids[-1]


def generate(
    model: Llama, prompt: Sequence[int], tokens: int, *, temperature: float, top_k: int, seed: int,
    top_p: float = 1.0, stop: int | None = None, use_cache: bool = True,
) -> list[int]:  # fmt: skip
    """``prompt`` and up to ``tokens`` more, ending before ``stop``: a function of its arguments."""
    ids = list(prompt)
    following = new_tokens(model, prompt, Sampling(temperature, top_k, top_p, seed), use_cache)
    for _, token in zip(range(tokens), following, strict=False):
        if token == stop:
            break
        ids.append(token)
    return ids


class Writer:
    """Continues texts, in pieces as they come; ``tokens`` and ``seconds`` tell of the latest one."""

    def __init__(self, model: Llama, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.seconds = 0, 0.0

    def write(self, prompt: str, tokens: int, sampling: Sampling, stops: Sequence[str] = ()) -> Iterator[str]:
        """Up to ``tokens`` more, ending before the first of ``stops`` or where the model ends the text.

        What may yet turn out as the beginning of a stop, or as part of a character, is held back until it is known.
        """
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        before, shown = len(self.tokenizer.decode(ids)), 0
        self.tokens, began, text = 0, time.perf_counter(), ""
        for _, token in zip(range(tokens), new_tokens(self.model, ids, sampling), strict=False):
            self.tokens, self.seconds = self.tokens + 1, time.perf_counter() - began
            if token == self.tokenizer.eos_id:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)[before:]
            if found := [text.find(stop) for stop in stops if stop in text]:
                text = text[: min(found)]
                break
            if known := text[shown : len(text) - _unsure(text, stops)]:
                yield known
                shown += len(known)
        yield text[shown:]

    @property
    def speed(self) -> str:
        return f"{self.tokens} tokens, {self.tokens / self.seconds:.1f} a second" if self.tokens else "no tokens"


def _unsure(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may change, or begin a stop."""
    whole = text.rstrip("\ufffd")
    begun = [n for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n])]
    return len(text) - len(whole) + max(begun, default=0)
