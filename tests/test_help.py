"""``--help`` tells the groups and the usual overrides, and what it names is there."""

import re
import subprocess

from pretrain.config import CONF, load


def test_the_help_of_a_launch_tells_groups_and_overrides_that_exist(root):
    told = subprocess.run(["./launch.sh", "--help"], cwd=root, capture_output=True, text=True, check=True).stdout
    for group in ("data", "experiment", "logger", "model", "optim"):
        (options,) = re.findall(rf"^{group}: (.*)$", told, re.M)
        assert {path.stem for path in (CONF / group).glob("*.yaml")} <= set(options.split(", "))
    overrides = re.findall(r"^  ([\w.]+=\S+)", told.split("The overrides people use")[1], re.M)
    assert len(overrides) >= 10
    load(overrides)
