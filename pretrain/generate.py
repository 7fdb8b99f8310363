"""Text from a model: sampling from the full forward, one token at a time."""

import torch
from torch import Tensor

from models.llama import Llama


@torch.no_grad()
def generate(
    model: Llama, prompt: list[int], tokens: int, *, temperature: float, top_k: int, seed: int, stop: int | None = None
) -> list[int]:
    """``prompt`` and up to ``tokens`` more, ending before ``stop``; sees at most the model's positions back.

    A function of its arguments: the draws come from a generator of their own. Temperature 0 takes the likeliest token.
    """
    device = model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(tokens):
        context = torch.tensor([ids[-model.max_position_embeddings :]], device=device)
        logits = model(context)[0, -1].float().cpu()
        token = _draw(logits, temperature, top_k, generator)
        if token == stop:
            break
        ids.append(token)
    return ids


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    best, tokens = logits.topk(min(top_k, logits.numel()))
    choice = torch.multinomial((best / temperature).softmax(-1), 1, generator=generator)
    return int(tokens[choice])
