"""The model card of an exported run: the README.md that Hugging Face shows for a model.

It describes the training, the data and the losses. Of an absolute path it gives only the last part, because a card is
meant to be published.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from models.llama import Llama
from pretrain.checkpoint.directory import read_state
from pretrain.config.compose import read_config
from pretrain.inference.pretrained import PretrainedModel

CARD = "README.md"
LOSSES = 10  # maximum number of validations in the card
HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- grass
---
"""
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


def model_card(found: PretrainedModel, run: Path, folder: str) -> str:
    """The Hugging Face model card of a checkpoint: Markdown with a YAML header, on its training, data and losses.

    Args:
        found: the model of the checkpoint.
        run: the folder of its run.
        folder: the name of the folder that the model is exported to.
    """
    config = cast("dict[str, Any]", OmegaConf.to_container(read_config(run / "config.yaml"), resolve=True))
    state, train = read_state(found.path), config["train"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(**found.arguments).parameters())
    sections = [
        f"{HEADER}\n# {folder}",
        f"A LLaMA of {parameters / 1e6:,.1f}M parameters, trained for {state['step']:,} steps of "
        f"{train['tokens_per_step']:,} tokens with {_method(config['optim'])}.",
        USE.format(folder=folder),
        f"It was trained on sequences of {train['seq_len']:,} tokens. Positions after them were not trained in this "
        "run.",
        "## Training data\n\n" + _table({**_corpus(config["data"]), **_data_facts(config, state)}),
        "## Training\n\n" + _table(_training(config, state, _summary(run))),
        "## Losses\n\n" + _losses(run, state["step"]),
    ]
    return "\n\n".join(sections) + "\n"


def _method(optim: dict[str, Any]) -> str:
    """The method in words."""
    inner = str(optim["inner"])
    if "refresh_every" in optim:
        return f"Grass ([arXiv 2406.17660](https://arxiv.org/abs/2406.17660)), in which {inner} steps on the rows"
    return inner


def _corpus(data: dict[str, Any]) -> dict[str, Any]:
    """The source of a corpus, or of each corpus of a mixture."""
    corpora = [{**data, **corpus} for corpus in data["mixture"]] if data["source"] == "mixture" else [data]
    facts: dict[str, Any] = {}
    for number, corpus in enumerate(corpora, 1):
        key = f"corpus {number}, weight {corpus['weight']}" if len(corpora) > 1 else "corpus"
        facts[key] = _source(corpus)
    return facts


def _source(corpus: dict[str, Any]) -> str:
    if corpus.get("dataset"):
        parts = [corpus.get(key) for key in ("dataset_name", "dataset_split", "dataset_revision")]
        return ", ".join(map(str, filter(None, [_name(corpus["dataset"]), *parts])))
    if corpus["source"] == "stdlib":
        return "the source code of Python's standard library"
    return f"{corpus['source']}: {', '.join(map(_name, corpus['paths']))}"


def _name(path: str) -> str:
    """The last part of an absolute path; any other path or name unchanged."""
    return Path(path).name if Path(path).is_absolute() else path


def _data_facts(config: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    data = config["data"]
    tokenizer = f"`{_name(data['tokenizer'])}`" if data["tokenizer"] else "trained on this corpus"
    return {
        "tokens trained on": f"{state['tokens']:,}",
        "tokenizer": f"{tokenizer}, {data['vocab_size']:,} tokens",
        "targets": "the responses" if data["source"] == "instructions" else None,
        "fingerprint of the tokens": f"`{state['data'].get('fingerprint', '')}`",
    }


def _rows(optim: dict[str, Any]) -> str | None:
    """The rows that Grass trained; None for other methods."""
    if "refresh_every" not in optim:
        return None
    how = f"chosen by `{optim['selection']}` every {optim['refresh_every']} steps"
    return f"{optim['rank']} of each linear layer, {how}"


def _training(config: dict[str, Any], state: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    optim, train, started = config["optim"], config["train"], state.get("init_from")
    warmup, minutes = optim["warmup_steps"], state["training_seconds"] / 60
    over = f"{warmup:.3g} of the run" if 0 < warmup < 1 else f"{warmup:g} steps"
    processes = f"{state['world_size']} process{'es' if state['world_size'] > 1 else ''}"
    return {
        "initial weights": f"{_name(started['path'])} (SHA-256 `{started['sha256']}`)" if started else "random",
        "optimizer": optim["inner"],
        "rows trained": _rows(optim),
        "learning rate": f"{optim['lr']:g}, of the linear layers {optim['linear_lr'] * optim.get('alpha', 1):g}",
        "schedule": f"{optim['schedule']}, with a warm-up over {over}",
        "weight decay": optim["weight_decay"],
        "gradient clipping": optim["clip"] or "none",
        "sequence length": train["seq_len"],
        "precision": train["dtype"],
        "seed": train["seed"],
        "time in training steps": f"{minutes:,.1f} minutes on {processes}",
        "torch": summary.get("versions", {}).get("torch"),
        "commit of the code": summary.get("commit"),
    }


def _summary(run: Path) -> dict[str, Any]:
    """The content of summary.json, which only a finished run has."""
    try:
        return json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def _losses(run: Path, step: int) -> str:
    """A table of validation losses up to ``step``: the first, the last and some in between."""
    lines = [line for line in _metrics(run / "metrics.jsonl") if line["step"] <= step]
    found = [line for line in lines if line.get("val/loss") is not None]
    if len(found) > LOSSES:
        found = [found[round(i * (len(found) - 1) / (LOSSES - 1))] for i in range(LOSSES)]
    head = ["| step | tokens | validation loss, nats per token | bits per byte |", "|---|---|---|---|"]
    rows = [
        f"| {line['step']:,} | {line['tokens']:,} | {line['val/loss']:.4f} | {line.get('val/bits_per_byte', 0):.4f} |"
        for line in found
    ]
    text = "\n".join([*head, *rows]) if rows else "There was no validation."
    for line in [line for line in lines if line.get("train/loss") is not None][-1:]:
        text += f"\n\nLast training loss: {line['train/loss']:.4f} nats per token, at step {line['step']:,}."
    return text


def _metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without incomplete lines from a crash."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line and "tokens" in line]


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])
