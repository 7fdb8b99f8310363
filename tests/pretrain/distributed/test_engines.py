"""DDP, FSDP2 and HSDP on 2 and 4 processes against one process, which needs none of them."""

import pytest
import torch

from pretrain.checkpoint.directory import path_of
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from tests.parallel_runs import (
    FSDP,
    GRASS,
    HSDP,
    STEPS,
    TINY,
    assert_same_losses,
    assert_same_run,
    chosen,
    collectives,
    open_checkpoint,
    run,
    spawn,
    train,
    values,
)  # fmt: skip


@pytest.fixture(scope="module")
def common(root, tmp_path_factory):
    """Overrides of every run here: the tiny model on a few of the project's own files, prepared once."""
    folder = tmp_path_factory.mktemp("runs")
    text = [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={folder / 'prepared'}"]
    overrides = [*TINY, *text, f"run.root={folder}"]
    ready(load([*overrides, "run.name=none"]), 1)
    return overrides


TWO = {
    "ddp": ["train.micro_batch_size=4"],
    "fsdp": [*FSDP, "train.micro_batch_size=4"],
    "fsdp-columns": [*FSDP, "train.micro_batch_size=2", "train.reshard=false", *GRASS["columns"]],
}
# Whose first update is looked at on the wire; two blocks, embedding and head, and no clipping.
WIRE = {
    "ddp": ["train.dtype=float32"],
    "ddp-bf16": ["train.dtype=float32", "train.reduce_dtype=bfloat16"],
    "ddp-wide": ["train.dtype=bfloat16", "train.reduce_dtype=float32"],
    "fsdp": [*FSDP, "train.dtype=float32"],
}
FOUR = {"hsdp-multinomial": [*HSDP, "train.micro_batch_size=2", *GRASS["multinomial_norm"]]}
# Sums of float32 over four processes: their order shows.
STOPPED = ["run.name=stopped", "optim.schedule=constant", "train.dtype=float32", "train.micro_batch_size=1"]
# One run handed on from four processes to two, to two of another kind, and to one.
RELAY = ["run.name=relay", "optim.schedule=constant", "train.micro_batch_size=1"]


def named(common, size, cases):
    return {name: [*common, f"run.name={name}-{size}", *overrides] for name, overrides in cases.items()}


@pytest.fixture(scope="module")
def four(common, tmp_path_factory):
    runs = named(common, 4, FOUR)
    stopped = [[*common, *STOPPED, f"train.steps={steps}"] for steps in (3, 6)]
    each = [*runs.values(), [*common, *RELAY, *HSDP, "train.steps=7"], *stopped]
    each.append([*common, *STOPPED, "train.steps=6", "run.name=never-stopped"])
    folders = {name: RunFolder(load(overrides)) for name, overrides in runs.items()}
    saved, settings = path_of(folders["hsdp-multinomial"].checkpoints, STEPS), runs["hsdp-multinomial"]
    calls = [(run, overrides) for overrides in each]
    calls += [(open_checkpoint, saved, [*settings, *engine]) for engine in (["train.parallel=ddp"], FSDP)]
    return folders | {"opened": spawn(4, tmp_path_factory.mktemp("four"), calls)[-2:]}


@pytest.fixture(scope="module")
def two(common, four, tmp_path_factory):
    runs = named(common, 2, TWO)
    ddp = ["train.steps=20", "train.reduce_dtype=float64"]
    relay = [[*common, *RELAY, *FSDP, "train.steps=15"], [*common, *RELAY, *ddp]]
    saved, settings = four["hsdp-multinomial"].latest_checkpoint, named(common, 4, FOUR)["hsdp-multinomial"]
    openings = [(saved, [*settings, "train.parallel=ddp"]), (saved, [*settings, *FSDP])]
    calls = [(run, overrides) for overrides in [*runs.values(), *relay]]
    calls += [(open_checkpoint, *opening) for opening in openings]
    calls += [
        (collectives, [*common, f"run.name=wire-{name}", "optim.inner=adamw", *more]) for name, more in WIRE.items()
    ]
    results = spawn(2, tmp_path_factory.mktemp("two"), calls)[len(runs) + len(relay) :]
    wire = {name: found[0] for name, found in zip(WIRE, results[len(openings) :], strict=True)}
    folders = {name: RunFolder(load(overrides)) for name, overrides in runs.items()}
    return folders | {"opened": results[: len(openings)], "wire": wire}


@pytest.fixture(scope="module")
def single(common):
    """The run of a single process, by its settings of Grass; its batch is not divided."""
    return {name: train([*common, f"run.name=alone-{name}", *more]) for name, more in GRASS.items()}


def test_two_processes_train_as_one(two, single):
    assert_same_run(two["ddp"], 2, single["top_r"])
    assert_same_run(two["fsdp"], 2, single["top_r"])
    assert_same_run(two["fsdp-columns"], 2, single["columns"])


def test_four_processes_in_two_sharded_copies_train_as_one(four, single):
    assert_same_run(four["hsdp-multinomial"], 4, single["multinomial_norm"])


def test_a_resumed_run_sums_in_the_order_of_one_that_was_never_stopped(common, four):
    stopped, whole = (RunFolder(load([*common, *STOPPED, *more])) for more in ([], ["run.name=never-stopped"]))
    assert values(stopped, "train/loss") == values(whole, "train/loss")
    held, expected = (torch.load(folder.path / "held-0.pt") for folder in (stopped, whole))
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)


def test_a_checkpoint_of_four_processes_is_the_same_on_one_two_and_four_in_both_engines(common, four, two):
    folder = four["hsdp-multinomial"]
    saved = torch.load(folder.path / "held-0.pt")
    here = open_checkpoint(folder.latest_checkpoint, named(common, 4, FOUR)["hsdp-multinomial"])
    found = [here, *(tensors for opened in [*two["opened"], *four["opened"]] for tensors in opened)]
    assert len(found) == 1 + 2 * 2 + 2 * 4
    for tensors in found:
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[name], saved[name]) for name in saved)


def test_a_run_handed_on_between_engines_and_numbers_of_processes_is_one_run(common, two):
    relay = train([*common, *RELAY])
    whole = train([*common, *RELAY, "run.name=unbroken"])
    assert_same_losses(relay, whole)
    assert chosen(relay, 1) == chosen(whole, 1)[20:]


def test_no_gradient_of_a_frozen_weight_travels(two):
    """DDP and FSDP2 sum as many numbers as there are trained parameters, in the dtype that is configured."""
    for name, dtype in (("ddp", "Float"), ("ddp-bf16", "BFloat16"), ("ddp-wide", "Float"), ("fsdp", "Float")):
        said, sizes = two["wire"][name]
        trained = sum(size for size, trains in sizes.values() if trains)
        assert sum(size for size, _ in sizes.values()) > 1.5 * trained
        # Gloo scatters a sum by making all of it everywhere; a single number is the norm for the clipping.
        summed = [numbers for what, of, numbers in said if (what, of) == ("gloo:all_reduce", dtype) and numbers > 1]
        assert sum(summed) == trained


def test_models_that_cannot_be_sharded_are_refused_with_the_fix(common):
    narrow = ["train.parallel=fsdp", "model.intermediate_size=49", "optim.side=auto"]
    with pytest.raises(
        ConfigError, match=r"down_proj selects rows of 49 .* 2 shards; set optim\.side=\{down_proj: columns\}"
    ):
        check(load([*common, *narrow]), 2)
    check(load([*common, *narrow, "optim.side={down_proj: columns}"]), 2)
    with pytest.raises(ConfigError, match=r"optim\.inner=adafactor cannot step on shards; use muon, adamw"):
        check(load([*common, "train.parallel=fsdp", "optim.inner=adafactor"]), 2)
    with pytest.raises(ConfigError, match=r"optim\.embedding_inner=adafactor cannot step on shards"):
        check(load([*common, "train.parallel=fsdp", "optim.embedding_inner=adafactor"]), 2)
    with pytest.raises(ConfigError, match=r"train\.shards=3 must be at least 2 and divide the 4 processes"):
        check(load([*common, "train.parallel=hsdp", "train.shards=3"]), 4)
