"""DDP, FSDP2 and HSDP on 2 and 4 processes against one process, which needs none of them."""

import json
import logging
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pretrain import checkpoint
from pretrain.build import build_model, build_optimization
from pretrain.check import check
from pretrain.config import ConfigError, load
from pretrain.distributed import World
from pretrain.interrupt import StopRequest
from pretrain.parallel import engine_of
from pretrain.preflight import ready
from pretrain.run_folder import RunFolder
from pretrain.trainer import Trainer

CPU = torch.device("cpu")
STEPS, REFRESH = 30, 8  # chooses rows four times
TINY = [
    "data=text", "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "optim.warmup_steps=2", f"train.steps={STEPS}",
    "train.tokens_per_step=256", "train.seq_len=32", "train.eval_sequences=7", "train.log_every=1",
    "train.checkpoint_every=0", "train.eval_every=0", "train.compile=false", "train.sample_tokens=4",
    "logger.wandb.mode=disabled", "train.dtype=float64", "optim.rank=8", f"optim.refresh_every={REFRESH}",
    "data.validation_share=0.2", "optim.weight_decay=0.1",
]  # fmt: skip
GRASS = {
    "top_r": [],
    "multinomial_norm": ["optim.selection=multinomial_norm"],
    "columns": ["optim.side=columns", "optim.state_at_refresh=reset"],
}


class Recording(Trainer):
    """Notes the rows that every step trained."""

    def fit(self):
        self.chosen = []
        return super().fit()

    def train_step(self, step):
        if self.optim.grass:
            self.chosen.append({name: layer.index.tolist() for name, layer in self.optim.grass.layers.items()})
        return super().train_step(step)


def train(overrides, rank=0, size=1):
    """Run in this process as ``rank`` of ``size``; leaves what was ``chosen`` and held beside what the run leaves."""
    config = load(overrides)
    folder = RunFolder(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    trainer = Recording(config, World(rank, size, CPU), ready(config, size), folder, StopRequest())
    trainer.fit()
    (folder.path / f"chosen-{rank}.json").write_text(json.dumps(trainer.chosen))
    torch.save(whole_tensors(trainer.model, trainer.optim), folder.path / f"held-{rank}.pt")
    return folder


def whole_tensors(model, optim):
    """All that a checkpoint holds, put together from every process."""
    tensors = checkpoint.tensors_of(model, optim)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def open_checkpoint(path, overrides, rank=0, size=1):
    """What a run with these settings finds in the checkpoint at ``path``."""
    config, world = load(overrides), World(rank, size, CPU)
    model = build_model(config, CPU, shard=engine_of(config.train, world).shard)
    optim = build_optimization(config, model)
    checkpoint.load(path, model, optim)
    return whole_tensors(model, optim)


def _worker(rank, size, folder, runs, openings):
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    for overrides in runs:
        train(overrides, rank, size)
    for number, (path, overrides) in enumerate(openings):
        torch.save(open_checkpoint(path, overrides, rank, size), f"{folder}/opened-{number}-{rank}.pt")
    dist.destroy_process_group()


def spawn(size, folder, runs, openings=()):
    """Runs, and then openings of checkpoints: (path, overrides); returns what each process found in these."""
    torch.multiprocessing.spawn(_worker, (size, str(folder), runs, openings), nprocs=size)
    return [[torch.load(folder / f"opened-{n}-{rank}.pt") for rank in range(size)] for n in range(len(openings))]


def values(folder, name):
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def chosen(folder, size):
    found = [json.loads((folder.path / f"chosen-{rank}.json").read_text()) for rank in range(size)]
    assert all(other == found[0] for other in found)
    return found[0]


@pytest.fixture(scope="module")
def common(root, tmp_path_factory):
    """Overrides of every run here: the tiny model on a few of the project's own files, prepared once."""
    folder = tmp_path_factory.mktemp("runs")
    text = [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={folder / 'prepared'}"]
    overrides = [*TINY, *text, f"run.root={folder}"]
    ready(load([*overrides, "run.name=none"]), 1)
    return overrides


def assert_same_run(ours, size, theirs, tolerance=1e-9):
    """The same rows at every step and the same losses and gradient norms, validation included."""
    assert chosen(ours, size) == chosen(theirs, 1)
    assert_same_losses(ours, theirs, tolerance)
    assert values(ours, "val/loss").keys() == {STEPS}


def assert_same_losses(ours, theirs, tolerance=1e-9):
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        mine, other = values(ours, name), values(theirs, name)
        assert mine.keys() >= other.keys() and len(other) > 0
        assert max(abs(mine[step] - other[step]) for step in other) <= tolerance, name


FSDP, HSDP = ["train.parallel=fsdp"], ["train.parallel=hsdp", "train.shards=2"]
TWO = {
    "ddp": ["train.micro_batch_size=4"],
    "fsdp": [*FSDP, "train.micro_batch_size=4"],
    "fsdp-columns": [*FSDP, "train.micro_batch_size=2", "train.reshard=false", *GRASS["columns"]],
}
FOUR = {"hsdp-multinomial": [*HSDP, "train.micro_batch_size=2", *GRASS["multinomial_norm"]]}
# One run handed on from four processes to two, to two of another kind, and to one.
RELAY = ["run.name=relay", "optim.schedule=constant", "train.micro_batch_size=1"]


def named(common, size, cases):
    return {name: [*common, f"run.name={name}-{size}", *overrides] for name, overrides in cases.items()}


@pytest.fixture(scope="module")
def four(common, tmp_path_factory):
    runs = named(common, 4, FOUR)
    spawn(4, tmp_path_factory.mktemp("four"), [*runs.values(), [*common, *RELAY, *HSDP, "train.steps=7"]])
    return {name: RunFolder(load(overrides)) for name, overrides in runs.items()}


@pytest.fixture(scope="module")
def two(common, four, tmp_path_factory):
    runs = named(common, 2, TWO)
    relay = [[*common, *RELAY, *FSDP, "train.steps=15"], [*common, *RELAY, "train.steps=20"]]
    saved, settings = four["hsdp-multinomial"].latest_checkpoint, named(common, 4, FOUR)["hsdp-multinomial"]
    openings = [(saved, [*settings, "train.parallel=ddp"]), (saved, [*settings, *FSDP])]
    opened = spawn(2, tmp_path_factory.mktemp("two"), [*runs.values(), *relay], openings)
    return {name: RunFolder(load(overrides)) for name, overrides in runs.items()} | {"opened": opened}


@pytest.fixture(scope="module")
def alone(common):
    """The run of a single process, by what Grass is told; its batch in one piece."""
    return {name: train([*common, f"run.name=alone-{name}", *more]) for name, more in GRASS.items()}


def test_two_processes_train_as_one(two, alone):
    assert_same_run(two["ddp"], 2, alone["top_r"])
    assert_same_run(two["fsdp"], 2, alone["top_r"])
    assert_same_run(two["fsdp-columns"], 2, alone["columns"])


def test_four_processes_in_two_sharded_copies_train_as_one(four, alone):
    assert_same_run(four["hsdp-multinomial"], 4, alone["multinomial_norm"])


def test_a_checkpoint_of_four_processes_is_the_same_on_one_and_on_two_in_both_engines(common, four, two):
    folder = four["hsdp-multinomial"]
    saved = torch.load(folder.path / "held-0.pt")
    here = open_checkpoint(folder.latest_checkpoint, named(common, 4, FOUR)["hsdp-multinomial"])
    found = [here, *(tensors for opened in two["opened"] for tensors in opened)]
    assert len(found) == 5
    for tensors in found:
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[name], saved[name]) for name in saved)


def test_a_run_handed_on_between_engines_and_numbers_of_processes_is_one_run(common, two):
    relay = train([*common, *RELAY])
    whole = train([*common, *RELAY, "run.name=unbroken"])
    assert_same_losses(relay, whole)
    assert chosen(relay, 1) == chosen(whole, 1)[20:]


def test_what_cannot_be_sharded_is_refused_with_the_mend(common):
    narrow = ["train.parallel=fsdp", "model.intermediate_size=49"]
    with pytest.raises(
        ConfigError, match=r"down_proj selects rows of 49 .* 2 shards; set optim\.side=\{down_proj: columns\}"
    ):
        check(load([*common, *narrow]), 2)
    check(load([*common, *narrow, "optim.side={down_proj: columns}"]), 2)
    with pytest.raises(ConfigError, match=r"optim\.inner=adafactor cannot step on shards; use adamw"):
        check(load([*common, "train.parallel=fsdp", "optim.inner=adafactor"]), 2)
    with pytest.raises(ConfigError, match=r"train\.shards=3 must be at least 2 and divide the 4 processes"):
        check(load([*common, "train.parallel=hsdp", "train.shards=3"]), 4)
