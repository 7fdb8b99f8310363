"""Samples: continuations of ``data.prompts`` by the model at the end of a run, in ``samples.md``."""

from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from models.llama import Llama
from pretrain.config.schema import Config
from pretrain.inference.hf_assets import ASSETS_FOLDER, end_ids
from pretrain.inference.sampling import generate, rows_without_token
from pretrain.runs.folder import RunFolder


def make_samples(model: Llama, tokenizer: Tokenizer, config: Config) -> list[tuple[str, str]]:
    """Continue each of ``data.prompts`` by at most ``train.sample_tokens`` tokens. Leaves the model in eval mode.

    Returns:
        Pairs of a prompt, and the prompt with its continuation, the same on every calling process; [] if
        ``train.sample_tokens`` is 0.
    """
    if config.train.sample_tokens == 0:
        return []
    model.eval()
    ends = {tokenizer.eos_id, *end_ids(RunFolder(config).path / ASSETS_FOLDER)}
    samples, never = [], rows_without_token(tokenizer, config.model.vocab_size, ends)
    for i, prompt in enumerate(config.data.prompts):
        with torch.compiler.set_stance("force_eager"):
            ids = generate(
                model, [tokenizer.bos_id, *tokenizer.encode(prompt)], config.train.sample_tokens,
                temperature=0.8, top_k=50, seed=config.train.seed + i, ends=ends, never=never,
            )  # fmt: skip
        samples.append((prompt, tokenizer.decode(ids)))
    return samples


def write_samples(file: Path, samples: list[tuple[str, str]], of: str) -> None:
    """Write the pairs of ``make_samples`` to the Markdown file ``file``; ``of`` names the run and step."""
    parts = [f"Prompt: `{prompt!r}`\n\n````text\n{text}\n````\n" for prompt, text in samples]
    file.write_text("\n".join([f"# Samples of {of}\n", *parts]), encoding="utf-8")
