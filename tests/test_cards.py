"""The ready configurations for cards compose, pass their checks, and fit their cards by the planner's count."""

import pytest

from pretrain.blocks import walk_all
from pretrain.check import check
from pretrain.config import CONF, load
from pretrain.estimate import highest, limit, needed

CARDS = sorted(path.stem for path in (CONF / "experiment").glob("*gb.yaml"))


@pytest.mark.parametrize("name", CARDS)
def test_it_composes_and_passes_the_checks(name):
    config = load([f"experiment={name}"])
    check(config, needs_data=False)
    size, memory = name.removesuffix("gb").split("_")
    assert config.model.name == f"llama_{size}"
    assert config.estimate.device_memory_gib < int(memory)  # of a card's memory not all can be used


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_its_steps_and_its_refresh_fit_the_card(name):
    config = load([f"experiment={name}"])
    seen = walk_all(config)
    regular, refresh = (highest(seen, step).total() for step in ("regular", "refresh"))
    assert needed(config, max(regular, refresh)) <= limit(config)
    assert refresh <= 1.02 * regular
