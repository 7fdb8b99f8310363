"""Grass with the Trainer of transformers.

    pip install torch "transformers[torch]"
    python examples/hf_trainer.py --out runs/hf_trainer
    python examples/hf_trainer.py --out runs/hf_trainer --resume    # from the newest checkpoint

Trains the model of plain_loop.py on the same text, without a download. Grass only adds `GrassCallback`: it chooses the
initial rows, and saves the state of Grass in each checkpoint of the Trainer. A resumed training is exact. At the end,
the folder `model` in --out holds a plain model for `from_pretrained`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))  # makes the checkout of Grass importable

from examples.plain_loop import TOKENS, new_model, text_bytes  # noqa: E402
from models.convert import convert_linears, restore_linears  # noqa: E402
from optim.grass import Grass  # noqa: E402


class GrassCallback(TrainerCallback):
    """Starts or resumes `grass` when the training begins, and saves it in each checkpoint.

    Args:
        grass: attached to the optimizer of the Trainer.
        first_backward: computes the gradient of one batch, which chooses the initial rows; makes no update.
    """

    def __init__(self, grass: Grass, first_backward: Callable[[], object]):
        self.grass, self.first_backward = grass, first_backward

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.grass.start(self.first_backward)
        else:  # the Trainer has loaded the model and the optimizer
            saved = torch.load(self._file(args, state), map_location="cpu", weights_only=True)
            self.grass.load_state_dict(state_dict=saved)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:  # the state is the same on all processes
            torch.save(self.grass.state_dict(), self._file(args, state))

    def _file(self, args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "grass.pt"


def train(out: Path, steps: int, save_every: int, resume: bool) -> tuple[list[float], Grass]:
    """Train up to `steps` steps. Return the losses that the Trainer logged, one per step, and Grass."""
    text = text_bytes()
    rows = text[: len(text) // TOKENS * TOKENS].view(-1, TOKENS)
    dataset = [{"input_ids": row, "labels": row} for row in rows]

    model = new_model()
    convert_linears(model, rank=16)  # before the optimizer is made
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    grass = Grass(model, optimizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=8, logging_steps=1,
            save_steps=save_every, report_to="none",
        ),
        train_dataset=dataset,
        optimizers=(optimizer, None),  # the Trainer makes the schedule
        callbacks=[GrassCallback(grass, lambda: first_loss(model, rows).backward())],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)

    restore_linears(model)  # plain nn.Linear again, with the trained weights
    trainer.save_model(str(out / "model"))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], grass


def first_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Return the loss of the first batch."""
    ids = rows[:8].to(model.device)
    return model(input_ids=ids, labels=ids).loss


def main(arguments: list[str] | None = None) -> tuple[list[float], Grass]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), help="output folder (default: %(default)s)")
    p.add_argument("--steps", type=int, default=100, help="training steps (default: %(default)s)")
    p.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in --out")
    args = p.parse_args(arguments)
    return train(args.out, args.steps, args.save_every, args.resume)


if __name__ == "__main__":
    main()
