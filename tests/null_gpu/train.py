"""`python -m pretrain.train` on the null GPU, where two things that mean nothing there would end it.

Validation has counted no tokens to divide by, and memory that nothing was computed in may hold numbers that are not
finite.

    tests/null_gpu/run.sh python tests/null_gpu/train.py [--counts=FILE] SETTING...

With --counts every step adds a line to FILE: what was counted from its beginning to that of the next, as JSON.
"""

import atexit
import json
import runpy
import sys
from dataclasses import replace
from unittest.mock import patch

from counts import contexts, counts, since

from pretrain.training.guards import Guards, Verdict
from pretrain.training.trainer import Trainer
from pretrain.training.validation import Score

metrics, train_step = Score.metrics.fget, Trainer.train_step
counting = next((argument for argument in sys.argv if argument.startswith("--counts=")), None)
lines: list[dict] = []


def metrics_of_some(score: Score) -> dict[str, float]:
    some = {name: max(1, int(getattr(score, name))) for name in ("tokens", "text_bytes")}
    return metrics(replace(score, **some))


def counted_step(trainer: Trainer, step: int) -> object:
    end_step()
    lines.append({"step": step, "before": counts()})
    return train_step(trainer, step)


def end_step() -> None:
    if lines and "before" in lines[-1]:
        lines[-1] |= since(lines[-1].pop("before"))


def write(path: str) -> None:
    end_step()
    with open(path, "w") as file:
        file.writelines(json.dumps({**line, "contexts": contexts()}) + "\n" for line in lines)


if counting:
    sys.argv.remove(counting)
    atexit.register(write, counting.partition("=")[2])
with (
    patch.object(Score, "metrics", property(metrics_of_some)),
    patch.object(Trainer, "train_step", counted_step),
    patch.object(Guards, "_fail", lambda *_: Verdict.CONTINUE),
):
    runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
