"""What real steps hold: against the planner, and Grass against other methods. All of it takes minutes."""

import json
import subprocess
import sys

import pytest

from benchmarks.memory_truth import CASES, compare


def assert_true(row):
    assert abs(row["planned"] / row["allocated"] - 1) <= 0.05, row
    assert abs(row["planned"] / row["resident"] - 1) <= 0.10, row


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_planner_tells_what_the_allocator_gives_out_and_what_is_resident(case):
    rows = compare(case)
    assert [row["step"] for row in rows] == ["regular", "refresh"]
    for row in rows:
        assert_true(row)


@pytest.mark.slow
def test_a_real_run_of_grass_holds_less_than_adamw_and_galore(root):
    command = "-m benchmarks.peak_memory --size 350m --rank 128 --methods adamw,galore,grass,grass+options --json"
    found = subprocess.run([sys.executable, *command.split()], cwd=root, capture_output=True, text=True, check=True)
    rows = json.loads(found.stdout)["rows"]
    peak = {row["method"]: row["peak_bytes"] - row["baseline_bytes"] for row in rows}
    assert all(row["steps"] == 3 for row in rows)
    assert peak["grass"] <= 0.60 * peak["adamw"]
    assert peak["grass"] <= 0.85 * peak["galore"]
    assert peak["grass+options"] <= 0.75 * peak["galore"]
