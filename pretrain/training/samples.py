"""What a run's model makes of some prompts at its end: ``samples.md``."""

from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from models.llama import Llama
from pretrain.config.schema import Config
from pretrain.inference.sampling import generate


def make_samples(model: Llama, tokenizer: Tokenizer, config: Config) -> list[tuple[str, str]]:
    """Each prompt and what the model makes of it, the same on every process; leaves the model in eval mode."""
    if config.train.sample_tokens == 0:
        return []
    model.eval()
    samples = []
    for i, prompt in enumerate(config.data.prompts):
        with torch.compiler.set_stance("force_eager"):
            ids = generate(
                model, [tokenizer.bos_id, *tokenizer.encode(prompt)], config.train.sample_tokens,
                temperature=0.8, top_k=50, seed=config.train.seed + i, ends=[tokenizer.eos_id],
            )  # fmt: skip
        samples.append((prompt, tokenizer.decode(ids)))
    return samples


def write_samples(file: Path, samples: list[tuple[str, str]], of: str) -> None:
    parts = [f"Prompt: `{prompt!r}`\n\n````text\n{text}\n````\n" for prompt, text in samples]
    file.write_text("\n".join([f"# Samples of {of}\n", *parts]), encoding="utf-8")
