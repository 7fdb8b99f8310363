"""A run that is killed at any moment goes on, and ends to the bit as if nothing had happened."""

import json
import os
import subprocess
import sys

import pytest


def kill(root, folder, times, seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(times), str(folder), str(seed)], cwd=root, text=True,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def assert_little_is_lost(told):
    """At most an interval, and in the background the steps made during a save, which kills.py counts for each kill."""
    lost = {way: max(map(int, steps), default=0) for way, steps in told["steps lost"].items()}
    assert lost["sync"] <= told["interval"] and lost["async"] <= 2 * told["interval"]


def test_ten_kills_leave_no_trace(root, tmp_path):
    told = kill(root, tmp_path, 10, seed=1)
    assert told["kills"] == 10 and told["inside a save"] > 0
    assert_little_is_lost(told)


@pytest.mark.slow
def test_two_hundred_kills_leave_no_trace(root, tmp_path):
    told = kill(root, tmp_path, 200, seed=2)
    assert told["kills"] == 200 and told["inside a save"] >= 60
    assert_little_is_lost(told)
