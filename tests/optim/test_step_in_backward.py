"""Steps made inside the backward: the same weights as steps made after it, with one gradient at a time."""

import gc
import weakref

import pytest
import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.setup.checks import check
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.train_step import TrainStep

CPU = torch.device("cpu")
TINY = [
    "model.vocab_size=40", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "train.tokens_per_step=32", "train.seq_len=8", "optim.clip=0",
]  # fmt: skip
GRASS = [
    "optim.rank=4", "optim.attention_weight=1", "optim.selection=top_r", "optim.refresh_every=2",
    "optim.side=columns", "optim.share_index=true",
]  # fmt: skip
IN_BACKWARD = "train.step_in_backward=true"


def trained(overrides, micro_batches=2, look=None):
    """Every tensor of a run, and the norms of its gradients, after 5 updates."""
    config = load([*TINY, *overrides])
    model = build_model(config, CPU)
    optim = build_optimizer(config, model)
    world = World(rank=0, size=1, device=CPU)
    engine = build_engine(config.train, world)
    engine.wrap(model)
    update = TrainStep(config, world, model, engine, optim)
    if look:
        optim.optimizer.register_step_pre_hook(lambda *_: look(model))

    def batch(step):
        ids = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(step))
        return [(part[:, :-1], part[:, 1:]) for part in ids.chunk(micro_batches)]

    if optim.grass:
        optim.grass.start(lambda: update.accumulate(batch(0)))
    norms = torch.stack([update(batch(step)).grad_norm.float() for step in range(5)])
    assert all(p.grad is None for p in model.parameters())
    return checkpoint.tensors_of(model, optim), norms


@pytest.mark.parametrize(
    "overrides",
    [
        GRASS,
        ["optim=adamw"],
        [*GRASS, "train.dtype=bfloat16", "optim.weight_decay=0.1"],
        [*GRASS, "train.dtype=bfloat16", "optim.selection=multinomial_norm_with_replacement", "optim.inner=sgd"],
        [*GRASS, "optim.norm_growth=1.01"],
        [*GRASS, "optim.inner=adafactor"],
        ["optim=muon"],
        ["optim=normuon"],
    ],
    ids=["grass", "adamw", "bf16", "bf16-sampled-sgd", "norm-growth", "adafactor", "muon", "normuon"],
)
def test_the_weights_and_all_state_are_those_of_steps_after_the_backward(overrides):
    expected, expected_norms = trained([*overrides, "optim.clip=0"])
    found, norms = trained([*overrides, "optim.clip=0", IN_BACKWARD])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(
        norms, expected_norms, rtol=1e-2 if "train.dtype=bfloat16" in overrides else 1e-5, atol=0
    )


def test_no_two_gradients_exist_at_a_time():
    def most_gradients(*overrides):
        counts = []
        trained(
            [*GRASS, *overrides], 1, lambda model: counts.append(sum(p.grad is not None for p in model.parameters()))
        )
        return max(counts)

    assert most_gradients() == 2 * 7 + 2 + 5  # rows, embedding and head, norms
    assert most_gradients(IN_BACKWARD) == 1


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["optim.clip=1"], 1, r"step_in_backward=true: the global norm .* set optim\.clip=0"),
        (["optim.clip=0"], 2, r"step_in_backward=true: gradients of 2 processes"),
        (["optim.clip=0", "optim.master_weights=true"], 1, r"set optim\.master_weights=false"),
        (["optim=galore", "optim.clip=0"], 1, r"galore counts its steps over all parameters"),
    ],
)
def test_settings_that_need_all_gradients_are_refused(overrides, processes, message):
    with pytest.raises(ConfigError, match=message):
        check(load([*overrides, IN_BACKWARD]), processes)


@pytest.mark.parametrize("overrides", [GRASS, ["optim=adamw"]])
def test_a_model_without_references_is_freed(overrides):
    """A run that goes back to a checkpoint builds another model, and there is room for one."""
    models = []
    trained([*overrides, IN_BACKWARD], look=lambda model: models.append(weakref.ref(model)))
    gc.collect()
    assert models and models[0]() is None
