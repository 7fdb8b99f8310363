"""The ablation: every run that it lists is one that can start, and its table says what the runs came to."""

import math
from pathlib import Path

import pytest
import yaml

from benchmarks import ablation
from pretrain.check import check
from pretrain.config import load
from pretrain.sweep import JobResult, combinations, parse

STUDY = yaml.safe_load((Path(ablation.__file__).parent / "ablation.yaml").read_text())
LINES = [
    (*STUDY["common"], *stage["common"], *line.split())
    for stage in STUDY["stages"].values()
    for lines in stage["sweeps"].values()
    for line in lines
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line[9:]))
def test_the_first_and_last_run_of_every_line_can_start(line):
    jobs = combinations(parse(list(line)))
    for job in (jobs[0], jobs[-1]):
        check(load(job))


def result(seed, loss, setting="optim=grass"):
    class Finished(JobResult):
        summary = {"val/loss": loss, "tokens_per_s": 100.0 * loss, "commit": "abc"}  # noqa: RUF012

    return Finished("name", ["train.steps=8", setting, f"train.seed={seed}"], "folder", "log", 0)


def test_the_seeds_of_a_setting_are_one_line_with_their_mean_and_its_standard_error():
    trials = {}
    for job in (result(0, 1.0), result(1, 2.0), result(2, 3.0), result(0, 2.5, "optim=adamw")):
        ablation.gather(trials, job, ["train.steps=8"])
    grass, adamw = trials.values()
    assert (grass.setting, grass.loss, [*grass.by_seed.values()]) == ("optim=grass", 2.0, [1.0, 2.0, 3.0])
    assert grass.error == pytest.approx(1 / math.sqrt(3))  # the standard deviation of 1, 2, 3 is 1
    lines = ablation.table({"Methods": [adamw, grass]}, grass)
    assert lines[4:6] == [
        "| `optim=grass` | 3 | 2.0000 ± 0.5774 | +0.0000 | 200 |",
        "| `optim=adamw` | 1 | 2.5000 | +1.5000 | 250 |",
    ]


def test_settings_are_compared_seed_by_seed():
    ours = ablation.Trial("ours", {"0": 1.0, "1": 2.0, "2": 3.0})
    theirs = ablation.Trial("theirs", {"2": 2.9, "0": 1.1, "5": 7.0})
    difference, error = ours.minus(theirs)  # of -0.1 and 0.1
    assert difference == pytest.approx(0) and error == pytest.approx(0.1)


def test_a_run_that_failed_is_left_out():
    trials = {}
    ablation.gather(trials, JobResult("name", ["optim=grass"], "folder", "log", 1), [])
    assert trials == {}


def test_the_picture_is_drawn(tmp_path):
    trials = {}
    for job in (result(0, 1.0), result(1, 2.0), result(0, 2.5, "optim=adamw")):
        ablation.gather(trials, job, ["train.steps=8"])
    ablation.plot({"screen": {"Methods": list(trials.values())}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
