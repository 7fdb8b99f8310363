"""What a finished run shows on W&B beside its metrics: tables, the picture of rows ever selected, a checkpoint."""

import io
from pathlib import Path
from typing import Any

import wandb

from pretrain import checkpoint
from pretrain.run_data import RunData

VALIDATION = ["step", "tokens", "val/loss", "val/perplexity", "val/bits_per_byte"]


def log_results(run: Any, folder: Path, samples: list[tuple[str, str]], with_checkpoint: bool) -> None:
    """Log the results of the run in ``folder`` to the W&B ``run``; ``samples`` are prompts and what followed."""
    data = RunData(folder, folder.name)
    lines = [[line[name] for name in VALIDATION] for line in data.lines if "val/loss" in line]
    shown: dict[str, Any] = {"tokens": data.lines[-1]["tokens"], "validation": wandb.Table([*VALIDATION], data=lines)}
    if samples:
        shown["samples"] = wandb.Table(["prompt", "continuation"], data=[list(sample) for sample in samples])
    if picture := _coverage(data):
        shown["coverage"] = wandb.Image(picture)
    run.log(shown)
    if with_checkpoint and (newest := checkpoint.latest(folder / "checkpoints")):
        artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": data.step})
        for path in (newest, folder / "config.yaml", folder / "tokenizer.model", folder / "tokenizer.json"):
            if path.exists():
                artifact.add_dir(str(path), path.name) if path.is_dir() else artifact.add_file(str(path))
        run.log_artifact(artifact)


def _coverage(data: RunData) -> Any:
    from PIL import Image

    from pretrain import pictures  # matplotlib takes a second to import, at the end of a run only

    if (figure := pictures.coverage(data, "wide")) is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return Image.open(file)
