"""The ready configurations for cards compose, pass their checks, fit their cards, and hold what their headers say."""

import re

import pytest

from pretrain.config.compose import CONF, load
from pretrain.planner.extrapolate import simulate_all_blocks
from pretrain.planner.memory import GIB, device_bytes, highest, needed_bytes
from pretrain.setup.checks import check

CARDS = sorted(path.stem for path in (CONF / "experiment").glob("*gb.yaml"))


@pytest.mark.parametrize("name", CARDS)
def test_it_composes_and_passes_the_checks(name):
    config = load([f"experiment={name}"])
    check(config, needs_data=False)
    size, memory = name.removesuffix("gb").split("_")
    assert config.model.name == f"llama_{size}"
    assert config.estimate.device_memory_gib < int(memory)  # of a card's memory not all can be used


def header(name):
    """GiB of tensors in a step, with a refresh, and on the device, as a configuration's first lines say."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text().replace("\n# ", " ")
    (found,) = re.findall(
        rf"Estimate: (\S+) GiB of tensors in a step, (\S+) with a refresh; (\S+) on the device "
        rf"\(python -m pretrain.estimate experiment={name}, ",
        text,
    )
    return found


@pytest.mark.parametrize("name", CARDS)
def test_the_documents_say_what_the_header_says(name, root):
    config = load([f"experiment={name}"])
    (row,) = re.findall(rf"^\| `{name}`.*\|$", (root / "docs" / "memory.md").read_text(), re.M)
    _, _, tokens, sequences, rank, _, on_the_device, _ = (cell.strip() for cell in row.split("|"))
    assert (int(tokens), int(sequences)) == (config.train.seq_len, config.train.micro_batch_size)
    assert int(rank) == config.optim.rank
    assert on_the_device == header(name)[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_its_steps_and_its_refresh_fit_the_card_and_are_what_the_header_says(name):
    config = load([f"experiment={name}"])
    seen = simulate_all_blocks(config)
    regular, refresh = (highest(seen, step).total() for step in ("regular", "refresh"))
    on_the_device = needed_bytes(config, max(regular, refresh))
    assert on_the_device <= device_bytes(config)
    assert refresh <= 1.02 * regular
    assert header(name) == tuple(f"{size / GIB:.2f}" for size in (regular, refresh, on_the_device))
