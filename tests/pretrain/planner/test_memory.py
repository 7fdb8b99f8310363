"""The planner: its arithmetic against hand-worked cases, its shortcut against full walks, its refusals."""

import json

import pytest
import torch

from optim.refresh_schedule import turn_offsets
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.estimate import run
from pretrain.planner.block_layout import layout_of
from pretrain.planner.extrapolate import _without_between, simulate_all_blocks
from pretrain.planner.memory import GIB, estimate, highest
from pretrain.planner.simulate import simulate
from pretrain.planner.storage_tracker import StorageTracker

TINY = [
    "model.vocab_size=64", "model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=2",
    "train.seq_len=16", "train.tokens_per_step=64", "train.micro_batch_size=2",
]  # fmt: skip
GRASS = [
    "optim.rank=4",
    "optim.attention_weight=1",
    "optim.selection=top_r",
    "optim.refresh_every=10",
    "optim.sketch_width=4",
]


def tiny(*overrides):
    grass = [] if any(o.startswith("optim=") and o != "optim=grass" for o in overrides) else GRASS
    return load([*TINY, *grass, *overrides])


def test_storages_are_counted_from_their_making_to_their_end_and_once():
    with StorageTracker() as storages:
        kept = torch.ones(100)
        storages.label([kept], "kept")
        storages.mark("a")
        gone = torch.ones(50) + kept[:50]  # a view holds nothing, the ones are let go
        storages.mark("b")
        del gone
        other = kept.t().neg()
        storages.mark("a")
    assert storages.peaks() == {
        "a 1": {"kept": 400, "temporaries": 400},
        "b 1": {"kept": 400, "temporaries": 400},
        "a 2": {"kept": 400, "temporaries": 400},
    }
    assert other.shape == (100,)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(
            ("train.dtype=bfloat16", "optim.state_dtype=bfloat16", "optim.refresh_every=1"), marks=pytest.mark.slow
        ),
        pytest.param(("optim.side=columns", "optim.share_index=true", "optim.stagger=false"), marks=pytest.mark.slow),
        pytest.param(("optim.probe_steps=1", "optim.refresh_every=9"), marks=pytest.mark.slow),
        pytest.param(("optim.refresh_every=4", "optim.side=columns"), marks=pytest.mark.slow),
        pytest.param(("optim.refresh_every=4", "optim.side=neurons"), marks=pytest.mark.slow),
        pytest.param(("optim.probe_steps=8", "optim.refresh_every=12"), marks=pytest.mark.slow),
        ("optim=adamw", "train.dtype=bfloat16", "optim.master_weights=true"),
        pytest.param(("optim=adamw8bit",), marks=pytest.mark.slow),
        pytest.param(("optim=galore", "optim.rank=4"), marks=pytest.mark.slow),
        pytest.param(("train.checkpointing=full", "train.step_in_backward=true", "optim.clip=0"),
                     marks=pytest.mark.slow),
        pytest.param(("train.checkpointing=every:2",), marks=pytest.mark.slow),
        pytest.param(("train.step_in_backward=true", "optim.clip=0", "train.lean_activations=true"),
                     marks=pytest.mark.slow),
        pytest.param(("optim.embedding_inner=adafactor", "train.checkpointing=selective"), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_few_blocks_tell_what_many_hold_to_the_byte(overrides, monkeypatch):
    """And the peak is never between the ends, where the shortcut does not look."""
    config = tiny("model.num_hidden_layers=10", *overrides)
    full = simulate(config, layout_of(config))
    walked = []
    monkeypatch.setattr(
        "pretrain.planner.extrapolate.simulate", lambda config, few: walked.append(few.blocks) or simulate(config, few)
    )
    assert simulate_all_blocks(config) == _without_between(full)
    assert max(walked) < 10
    for step in ("regular", "refresh"):
        assert highest(full, step).total() == highest(_without_between(full), step).total()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("optim.refresh_every=4", "optim.probe_steps=1"), marks=pytest.mark.slow),
        pytest.param(("optim.refresh_every=4", "optim.probe_steps=3"), marks=pytest.mark.slow),
        pytest.param(("optim.refresh_every=8", "optim.probe_steps=1"), marks=pytest.mark.slow),
        ("optim.refresh_every=6", "train.checkpointing=full", "train.seq_len=128"),
        pytest.param(
            ("optim.refresh_every=8", "train.checkpointing=full", "train.seq_len=128"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_walked_refresh_holds_what_the_worst_step_of_a_window_does(overrides, monkeypatch):
    """With blocks whose turns come when a run of this many gives them theirs, step by step.

    It may hold more by the sketches of earlier steps: it takes all that are probed to have one already.
    """
    config = tiny("model.num_hidden_layers=6", "optim.stagger=true", "train.tokens_per_step=256", *overrides)
    planned = highest(simulate(config, layout_of(config)), "refresh")

    def window(steps):
        grass = steps.optim.grass
        offsets = turn_offsets(list(grass.layers), grass.schedule.refresh_every)
        # Two windows: only in the second one do sketches of the first turns lie from one step to the next.
        for step in range(2 * grass.schedule.refresh_every):
            steps.run(f"window {step}", step, offsets)

    monkeypatch.setattr("pretrain.planner.simulate._Steps.refresh", window)
    worst = highest(simulate(config, layout_of(config)), "window").total()
    assert worst <= planned.total() <= worst + planned["sketch"]


@pytest.mark.parametrize(
    ("overrides", "walked"),
    [
        # One of 12 blocks at a time: the first, then the last.
        (("optim.stagger=true", "optim.refresh_every=12", "optim.probe_steps=1"), [(0, 3), (0, 4), (0, 5)]),
        # Two at once, the first and the last.
        (("optim.stagger=true", "optim.refresh_every=8", "optim.probe_steps=1"), [(1, 2), (1, 3), (1, 4)]),
        (("optim.stagger=true", "optim.refresh_every=2", "optim.probe_steps=1"), [(2, 2), (3, 2), (2, 3), (4, 4)]),
        (("optim.stagger=true", "optim.refresh_every=10", "optim.probe_steps=9"), [(2, 1), (3, 1), (4, 1)]),
        (("optim.stagger=true", "optim.refresh_every=2", "optim.probe_steps=2"), [(3, 0), (4, 0), (5, 0)]),
        # No row is scored, so that all blocks refresh at once.
        (
            ("optim.stagger=auto", "optim.refresh_every=12", "optim.selection=cyclic", "optim.inner=muon"),
            [(3, 0), (4, 0), (5, 0)],
        ),
        (("optim.stagger=false", "optim.refresh_every=3"), [(3, 0), (4, 0), (5, 0)]),
        (
            (
                "optim=adamw",
                "train.checkpointing=every:2",
            ),
            [(3, 0), (5, 0), (7, 0)],
        ),
        (
            (
                "optim=adamw",
                "train.checkpointing=every:5",
            ),
            [(11, 0)],
        ),
    ],
)
def test_a_few_blocks_are_walked_where_they_are_like_many(overrides, walked, monkeypatch):
    layouts = []
    monkeypatch.setattr("pretrain.planner.extrapolate.simulate", lambda config, few: layouts.append(tuple(few)) or {})
    simulate_all_blocks(tiny("model.num_hidden_layers=12", *overrides))
    assert layouts == walked


def test_what_can_be_counted_by_hand_is_so():
    found, refresh = estimate(tiny("optim=adamw", "model.num_hidden_layers=2"))
    assert found.parameters == 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert found.components["weights"] == found.parameters * 4
    parameters = 2 + 2 * 9 + 1
    assert found.components["optimizer_state"] == found.parameters * 8 + parameters * 4  # Adam's step is a tensor
    assert found.peak_bytes == sum(found.components.values()) == found.refresh_peak_bytes == sum(refresh.values())
    assert (found.communicated_bytes_per_step, found.max_micro_batch_size) == (0, None)


def test_gradients_and_state_of_grass_are_those_of_the_rows():
    dense, _ = estimate(tiny("optim=adamw", "model.num_hidden_layers=1", "train.micro_batch_size=4"))
    grass, refresh = estimate(tiny("optim.inner=adamw", "model.num_hidden_layers=1", "train.micro_batch_size=4"))
    linears, rows = 4 * 32 * 32 + 3 * 32 * 48, 4 * (4 * 32 + 3 * 48)
    assert dense.components["optimizer_state"] - grass.components["optimizer_state"] == 8 * (linears - rows)
    assert grass.components["rows"] == 4 * rows + (4 * 4 + 3 * 6) * (8 + 4)  # and index and scale of each
    assert grass.components["sketch"] == 0 < refresh["sketch"]


def test_scaled_rotary_positions_are_planned_and_hold_no_memory():
    scaling = "factor:8.0,low_freq_factor:1.0,high_freq_factor:4.0,original_max_position_embeddings:8"
    found, _ = estimate(tiny("model.num_hidden_layers=2", f"model.rope_scaling={{rope_type:llama3,{scaling}}}"))
    assert found == estimate(tiny("model.num_hidden_layers=2"))[0]


def test_json_is_one_object_with_the_named_keys(capsys):
    run(tiny("estimate.format=json"))
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "peak_bytes", "refresh_peak_bytes", "components", "parameters", "flops_per_token",
        "communicated_bytes_per_step", "communicated_bytes_per_refresh", "max_micro_batch_size",
    ]  # fmt: skip
    assert sum(found["components"].values()) == found["peak_bytes"]


def test_the_table_shows_both_peaks(capsys):
    run(tiny("estimate.device_memory_gib=1"))
    out = capsys.readouterr().out
    assert "a refresh" in out and "optimizer state" in out and "largest micro-batch that fits in 1 GiB" in out


def test_blocks_take_turns_in_the_plan_where_they_do_in_the_run():
    scored = ["optim.inner=adamw", "optim.refresh_every=50", "model.num_hidden_layers=8"]
    assert layout_of(tiny(*scored, "optim.side=columns")).middle > 0
    assert layout_of(tiny(*scored, "optim.side=rows")) == (7, 0)  # nothing to gain: all blocks refresh together


@pytest.mark.parametrize("tokens", [32, pytest.param(64, marks=pytest.mark.slow)], ids=["at once", "accumulated"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(tokens):
    limit = ["estimate.context_gib=0", "estimate.allocator_overhead=0", f"train.tokens_per_step={tokens}"]
    base = tiny(*limit, "model.num_hidden_layers=7")
    budget = 1.5 * estimate(base)[0].peak_bytes
    largest = estimate(tiny(*limit, "model.num_hidden_layers=7", f"estimate.device_memory_gib={budget / GIB}"))[0]
    size = largest.max_micro_batch_size
    assert size > 2

    def peak(size):
        sized = [f"train.micro_batch_size={size}", f"train.tokens_per_step={size * tokens // 2}"]
        config = tiny("model.num_hidden_layers=7", *sized)
        seen = simulate(config, layout_of(config))
        return max(highest(seen, "regular").total(), highest(seen, "refresh").total())

    assert peak(size) <= budget < peak(size + 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=llama_1b", "estimate.device_memory_gib=4"], r"=4: .* 4\.99 of them for the weights; .*bfloat16"),
        (["model=llama_130m", "optim=adamw", "train.micro_batch_size=1", "train.seq_len=64",
          "estimate.device_memory_gib=2"], "of them for the optimizer state; .*optim=grass, optim.embedding_inner="),
        (["optim.rank=9999"], "optim.rank=9999 must be between 1 and 256"),
        (["model.attention=flash"], "flash-attn needs a CUDA device"),
        (["estimate.devices=0"], "estimate.devices=0 must be at least 1"),
        (
            ["estimate.device_memory_gib=0"],
            "estimate.device_memory_gib=0.0 must be greater than 0, or null for no limit",
        ),
        (["estimate.format=xml"], "choose from table, json"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_cause_and_mend(overrides, message, capsys):
    with pytest.raises(ConfigError, match=message):
        run(load(overrides))


def test_the_micro_batch_that_is_advised_divides_the_step_and_fits():
    """Though a run that accumulates holds its gradients besides: what fits without is 17 sequences of the 64."""
    base = ["model.num_hidden_layers=1", "train.seq_len=1024", "train.tokens_per_step=65536", "estimate.context_gib=0"]
    with pytest.raises(ConfigError, match=r"of them for the activations; set train.micro_batch_size=16$"):
        run(load([*base, "estimate.device_memory_gib=1.3"]))
    run(load([*base, "estimate.device_memory_gib=1.3", "train.micro_batch_size=16"]))


def test_where_only_a_refresh_does_not_fit_the_message_names_the_sketch():
    wide = ["optim.sketch_width=512", "model.num_hidden_layers=2", "train.micro_batch_size=1"]
    found, _ = estimate(tiny(*wide))
    between = (found.peak_bytes + found.refresh_peak_bytes) / 2 / GIB
    exact = ["estimate.context_gib=0", "estimate.allocator_overhead=0", f"estimate.device_memory_gib={between}"]
    with pytest.raises(ConfigError, match=r"of them for the sketch; try a smaller optim.sketch_width"):
        run(tiny(*wide, *exact))


COLUMNS = ("optim.side=columns", "optim.share_index=true", "optim.stagger=auto", "optim.refresh_every=50")
LEAN = ("train.lean_activations=true", "train.step_in_backward=true", "optim.clip=0", "optim.embedding_inner=adafactor")


@pytest.mark.parametrize(
    ("tokens", "overrides", "limit"),
    [
        (256, (), 29.5),
        (256, ("optim.state_dtype=float32",), 32.0),
        pytest.param(256, (*COLUMNS, *LEAN), 27.0, marks=pytest.mark.slow),
        pytest.param(2048, (*COLUMNS, *LEAN), 38.0, marks=pytest.mark.slow),
        pytest.param(2048, ("train.lean_activations=true",), 38.0, marks=pytest.mark.slow),
        pytest.param(2048, ("train.checkpointing=full",), 30.0, marks=pytest.mark.slow),
    ],
    ids=["bf16 state", "fp32 state", "options", "no product again", "lean alone", "checkpointed"],
)
def test_13b_stays_below(tokens, overrides, limit):
    """At rank 64, micro-batch 1; a matrix product is made again only under checkpointing (tests/test_recipes.py)."""
    config = load([
        "model=llama_13b", "optim.rank=64", "train.dtype=bfloat16", "optim.state_dtype=bfloat16",
        "train.micro_batch_size=1", f"train.seq_len={tokens}", f"train.tokens_per_step={tokens}", *overrides,
    ])  # fmt: skip
    found, _ = estimate(config)
    assert found.peak_bytes <= limit * GIB
    assert found.refresh_peak_bytes <= 1.02 * found.peak_bytes
