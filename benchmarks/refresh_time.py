"""How much longer a step with a refresh takes than a regular one: steps in turn, medians.

python -m benchmarks.refresh_time                       # llama_60m, rank 128, sketch; all layers refresh at once
python -m benchmarks.refresh_time optim.score=exact     # any overrides of the training command
python -m benchmarks.refresh_time --as-set --pairs 20   # as the settings have it, beside a run that never refreshes
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from pretrain.config.compose import load
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.train_step import TrainStep

SHAPE = [
    "model=llama_60m", "optim.rank=128", "optim.selection=top_r", "optim.refresh_every=10", "train.seq_len=256",
    "train.tokens_per_step=1024",
]  # fmt: skip
# Every other step gathers the scores of all layers and refreshes them, at their dearest; the others do nothing of it.
TOGETHER = ["optim.refresh_every=2", "optim.probe_steps=1", "optim.stagger=false"]


def measure(overrides: list[str], pairs: int) -> dict[str, float]:
    """Median seconds of a regular and a refresh step, which take turns, and the median of the ratios of neighbours."""
    timed = timed_step([*overrides, *TOGETHER])
    regular, refresh = zip(*[(timed(), timed()) for _ in range(pairs + 2)][2:], strict=True)  # two to warm up
    ratios = [slow / plain for plain, slow in zip(regular, refresh, strict=True)]
    return {"regular_s": median(regular), "refresh_s": median(refresh), "ratio": median(ratios)}


def measure_as_set(overrides: list[str], pairs: int) -> dict[str, float]:
    """Median seconds of a step of two runs that take turns, and the ratio of their sums: as set, and with frozen rows.

    Where blocks take turns every step may gather scores of some, and none is regular; whole windows say what it costs.
    """
    frozen, as_set = (timed_step([*overrides, *more]) for more in (["optim.selection=frozen"], []))
    plain, whole = zip(*[(frozen(), as_set()) for _ in range(pairs + 2)][2:], strict=True)
    return {"frozen_s": median(plain), "as_set_s": median(whole), "ratio": sum(whole) / sum(plain)}


def timed_step(overrides: list[str]) -> Callable[[], float]:
    """What makes the next step of a run of its own, at SHAPE, and returns its seconds.

    They are the process' own on all of its threads, where the device is a CPU: what else is at work counts less.
    """
    config = load([*SHAPE, *overrides])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, device)
    optim = build_optimizer(config, model)
    world = World(rank=0, size=1, device=device)
    engine = build_engine(config.train, world)
    engine.wrap(model)
    update = TrainStep(config, world, model, engine, optim)
    train = config.train
    sequences = train.tokens_per_step // train.seq_len
    ids = torch.randint(config.model.vocab_size, (sequences, train.seq_len + 1))
    batch = [(ids[:, :-1], ids[:, 1:])]
    assert optim.grass is not None
    optim.grass.start(lambda: update.accumulate(batch))

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def timed() -> float:
        began = seconds()
        update(batch)
        return seconds() - began

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the training command, such as optim.sketch_width=32")
    parser.add_argument("--pairs", type=int, default=15, help="regular and refresh steps that are timed")
    parser.add_argument("--as-set", action="store_true", help="leave what is refreshed when to the settings")
    arguments = parser.parse_args()
    print(json.dumps((measure_as_set if arguments.as_set else measure)(arguments.overrides, arguments.pairs)))


if __name__ == "__main__":
    main()
