"""The refresh schedule: when layers are probed and refreshed, and the warm-up after a refresh."""

import pytest
import torch
from torch import nn

from models.grass_linear import GrassLinear
from optim.refresh_schedule import RefreshSchedule, block_of, most_at_once, takes_turns

NAMES = [f"layers.{block}.{linear}" for block in range(3) for linear in ("mlp.up_proj", "mlp.down_proj")]


def blocks(names):
    return sorted({block_of(name) for name in names})


def test_all_layers_refresh_at_the_end_of_a_window_and_probe_in_the_updates_before():
    schedule = RefreshSchedule(NAMES, refresh_every=5, probe_steps=2)
    assert [steps for steps in range(1, 16) if schedule.due(steps)] == [5, 10, 15]
    assert all(schedule.due(steps) == NAMES for steps in (5, 10))
    # The updates after 3 and after 4 updates are the last two of the first window.
    assert [steps for steps in range(10) if schedule.probing(steps)] == [3, 4, 8, 9]
    assert [schedule.steps_to_refresh(NAMES[0], steps) for steps in range(6)] == [5, 4, 3, 2, 1, 5]
    assert [schedule.window(NAMES[0], steps) for steps in (0, 4, 5, 10)] == [0, 0, 1, 2]


def test_staggered_blocks_take_turns_evenly_and_keep_their_layers_together():
    schedule = RefreshSchedule(NAMES, refresh_every=6, stagger=True)
    due = {steps: blocks(schedule.due(steps)) for steps in range(1, 7)}
    assert due == {1: [], 2: ["layers.2"], 3: [], 4: ["layers.1"], 5: [], 6: ["layers.0"]}
    assert all(len(schedule.due(steps)) in (0, 2) for steps in range(20))


def test_frozen_layers_are_never_probed_after_the_start():
    schedule = RefreshSchedule(NAMES, refresh_every=2, frozen=True)
    assert not any(schedule.probing(steps) for steps in range(10))


def test_the_rate_warms_up_after_each_refresh():
    schedule = RefreshSchedule(NAMES, refresh_every=5, warmup=4)
    assert [schedule.rate_factor(steps) for steps in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.25]
    assert RefreshSchedule(NAMES, refresh_every=5).rate_factor(0) == 1.0


@pytest.mark.parametrize("probe_steps", [1, 2, 3, 9])
@pytest.mark.parametrize(("count", "refresh_every"), [(3, 6), (4, 10), (8, 3)])
def test_the_most_blocks_probed_in_one_update_are_counted(count, refresh_every, probe_steps):
    names = [f"layers.{block}.linear" for block in range(count)]
    schedule = RefreshSchedule(names, refresh_every, probe_steps, stagger=True)
    per_update = [len(schedule.probing(steps)) for steps in range(3 * refresh_every)]
    assert most_at_once(count, refresh_every, probe_steps) == max(per_update)
    assert sum(per_update[:refresh_every]) == count * min(probe_steps, refresh_every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": 0}, "optim.refresh_every=0 must be at least 1"),
        ({"refresh_every": 2, "probe_steps": -1}, "optim.probe_steps=-1 must be at least 1"),
        ({"refresh_every": 2, "stagger": True, "warmup": 1}, "optim.refresh_warmup needs all blocks to choose rows"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RefreshSchedule(NAMES, **options)


def test_auto_takes_turns_where_columns_are_scored_and_no_warm_up_needs_a_common_refresh():
    layers = [GrassLinear(nn.Parameter(torch.zeros(8, 8)), 2, side) for side in ("rows", "columns")]
    assert takes_turns("auto", layers) and not takes_turns("auto", layers[:1]) and not takes_turns("auto", [])
    assert not takes_turns("auto", layers, warmup=2)
    assert takes_turns(True, []) and not takes_turns(False, layers)
