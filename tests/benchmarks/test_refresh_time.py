"""What a refresh costs in time, at the shape of the 60M model."""

import pytest

from benchmarks.refresh_time import measure


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["muon", "adamw"])
def test_a_step_with_a_sketched_refresh_takes_at_most_fifteen_hundredths_longer(inner):
    assert measure([f"optim.inner={inner}"], pairs=9)["ratio"] <= 1.15
