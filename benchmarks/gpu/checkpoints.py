"""How long three consecutive saves by the trainer's saver block the training, and how many bytes each writes."""

import shutil
import tempfile
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.training import TINY, TrainingRun, settings
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import Saver

SAVES = 3
SHAPE = ["model=llama_350m", "train.seq_len=256", "train.tokens_per_step=4096", "optim.rank=128"]
DRY_SHAPE = ["model=llama_nano", *TINY, "train.tokens_per_step=64", "optim.rank=16"]


def run(bench: Bench, case: str) -> None:
    config = settings([*(DRY_SHAPE if bench.dry else SHAPE), "optim=grass", "train.dtype=bfloat16"])
    run = TrainingRun(config, bench.device)
    run.take_some_rows()
    folder = Path(tempfile.mkdtemp(dir=bench.folder))  # on the disk of the results; /tmp may be another disk
    try:
        saver = Saver(folder, run.world)
        for number in range(1, SAVES + 1):
            run.step(run.batch)
            bench.synchronize()
            with bench.row(save=number) as row:
                tensors = checkpoint.tensors_of(run.model, run.optim)
                row["gib"] = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**30
                saver.save(number, tensors, {"step": number})
                row["blocked_s"] = saver.blocked_seconds
                saver.finish()
                row["written_s"] = saver.seconds
    finally:
        shutil.rmtree(folder, ignore_errors=True)
