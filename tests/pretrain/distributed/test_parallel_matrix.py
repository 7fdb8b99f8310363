"""Every engine at every number of processes, with and without accumulation, is the one run of a single process."""

import itertools

import pytest

from pretrain.config.compose import load
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from tests.parallel_runs import FSDP, GRASS, HSDP, TINY, assert_same_run, run, spawn, train, values

ENGINES = {2: {"ddp": [], "fsdp": FSDP}, 4: {"ddp": [], "fsdp": FSDP, "hsdp": HSDP}}
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
CLIP = 0.5
EXPLICIT = ["optim.inner=adamw", "optim.score=sketch", f"optim.clip={CLIP}"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_is_one_run(root, tmp_path, size, dtype):
    text = [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={tmp_path / 'prepared'}"]
    common = [*TINY, *text, *EXPLICIT, f"run.root={tmp_path}", f"train.dtype={dtype}"]
    ready(load([*common, "run.name=none"]), 1)
    runs = {}
    for (engine, more), accumulation, choice in itertools.product(
        ENGINES.get(size, {"single": []}).items(), (1, 2), GRASS
    ):
        micro = f"train.micro_batch_size={8 // size // accumulation}"
        runs[choice, f"{engine}-{accumulation}-{choice}"] = [*more, *GRASS[choice], micro]
    overrides = {names: [*common, *more, f"run.name={names[1]}"] for names, more in runs.items()}
    single = {name: train([*common, *more, f"run.name=one-{name}"]) for name, more in GRASS.items()}
    if size == 1:
        for each in overrides.values():
            train(each)
    else:
        spawn(size, tmp_path, [(run, each) for each in overrides.values()])
    for (choice, _), each in overrides.items():
        assert_same_run(RunFolder(load(each)), size, single[choice], TOLERANCE[dtype])
    assert max(values(single["top_r"], "train/grad_norm").values()) > CLIP
