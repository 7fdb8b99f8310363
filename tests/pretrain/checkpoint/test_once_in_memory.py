"""Nothing is in memory twice that need not be: models and states while built, resumed or started, no gradient whole.

Counted by the allocator's events. Among them is the mapping of a file that safetensors reads from: the page cache's
memory, which the kernel takes back when it needs it, and so left out here.
"""

import pytest
import torch

from models.grass_linear import GrassLinear
from pretrain.checkpoint.tensors import tensors_of
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.inference.pretrained import load_pretrained
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.setup.model import build_model
from pretrain.training.trainer import Trainer
from tests.helpers import Allocations, allocations
from tests.tiny_runs import ALONE, train

DEEP = [
    "model.hidden_size=64", "model.intermediate_size=176", "model.num_hidden_layers=12", "train.steps=3",
    "train.sample_tokens=0", "train.eval_sequences=1",
]  # fmt: skip


ALMOST = 1.3  # times the whole: a tensor or a block more, far from twice


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def mapped(folder):
    """Bytes of the only file with tensors of a run, in its last checkpoint."""
    (file,) = folder.latest_checkpoint.glob("*.safetensors")
    return file.stat().st_size


@pytest.fixture
def deep(overrides):
    """Overrides of a run of many small blocks, so that a tensor, or the weights of a block, are little of a model."""
    return lambda *more: overrides(*DEEP, *more)


@pytest.mark.parametrize("more", [(), ("train.dtype=bfloat16",), ("optim.int8_weights=true",)], ids=" ".join)
def test_building_a_model_makes_every_weight_once(deep, more):
    config, models = load(deep(*more)), []
    peak, _ = allocations(lambda: models.append(build_model(config, torch.device("cpu"))))
    whole = bytes_of([*models[0].parameters(), *models[0].buffers()])
    assert whole <= peak <= ALMOST * whole


@pytest.mark.parametrize("int8", ["false", "true"])
def test_a_checkpoint_is_read_into_its_place(deep, int8):
    """A run that goes on reads it a tensor at a time; whoever wants the weights alone, a block at a time."""
    settings = deep(f"optim.int8_weights={int8}")
    folder, _ = train(settings)

    def peak_and_trainer(*more):
        config, trainers = load([*settings, *more]), []
        data = ready(config, 1)
        peak, _ = allocations(lambda: trainers.append(Trainer(config, ALONE, data, RunFolder(config), StopRequest())))
        return peak - mapped(folder), trainers[0]

    peak, trainer = peak_and_trainer()
    assert trainer.step == 3
    assert peak <= ALMOST * bytes_of(tensors_of(trainer.model, trainer.optim).values())
    peak, trainer = peak_and_trainer(f"train.init_from={folder.path}", "run.name=another")
    assert trainer.step == 0
    assert peak <= ALMOST * bytes_of([*trainer.model.parameters(), *trainer.model.buffers()])
    models = []
    peak, _ = allocations(lambda: models.append(load_pretrained(folder.path)[0]))
    assert peak - mapped(folder) <= ALMOST * bytes_of(models[0].parameters())


SHORT = ["train.seq_len=20", "train.tokens_per_step=80", "train.steps=12"]  # no length is a width of the model


def shapes_of_a_run(settings):
    """Of all tensors made in the first windows of a run, and those of its Grass weights."""
    config = load(settings)
    trainer = Trainer(config, ALONE, ready(config, 1), RunFolder(config), StopRequest())
    with Allocations() as made:
        trainer.optim.grass.start(lambda: trainer.update.accumulate(trainer.feed.micro_batches(0)))
        for step in range(config.train.steps):
            trainer.train_step(step)
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, GrassLinear)]
    return made.shapes, {tuple(shape) for layer in layers for shape in (layer.weight.shape, layer.weight.mT.shape)}


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["train.dtype=bfloat16"],
        ["train.step_in_backward=true", "optim.clip=0"],
        ["optim.side=columns", "optim.share_index=true", "train.lean_activations=true"],
        ["optim.inner=adamw", "train.checkpointing=full"],
    ],
    ids=lambda more: " ".join(more) or "defaults",
)
def test_no_step_and_no_refresh_makes_a_tensor_of_a_full_gradient_s_shape(overrides, more):
    shapes, full = shapes_of_a_run(overrides(*SHORT, *more, grass=["optim.rank=8"]))
    assert full == {(32, 32), (32, 48), (48, 32)}
    assert shapes and not shapes & full


def test_the_exact_score_does_make_one(overrides):
    shapes, full = shapes_of_a_run(
        overrides(*SHORT, "optim.score=exact", "optim.selection=top_r", grass=["optim.rank=8"])
    )
    assert shapes & full
