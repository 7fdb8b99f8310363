"""The ablation: every run that it lists is one that can start, and its table says what the runs came to."""

import json
import math
import shlex
from pathlib import Path

import pytest
import yaml

from benchmarks import ablation
from pretrain.config.compose import load
from pretrain.runs.sweep_results import JobResult
from pretrain.setup.checks import check
from pretrain.sweep import combinations, parse

STUDY = yaml.safe_load((Path(ablation.__file__).parent / "ablation.yaml").read_text())


def lines_of(study):
    """The overrides of each sweep that a study lists."""
    return [
        (*study["common"], *stage["common"], *line.split())
        for stage in study["stages"].values()
        for lines in stage["sweeps"].values()
        for line in lines
    ]


@pytest.mark.parametrize("line", lines_of(STUDY), ids=lambda line: " ".join(line[9:]))
def test_the_first_and_last_run_of_every_line_can_start(line):
    jobs = combinations(parse(list(line)))
    for job in (jobs[0], jobs[-1]):
        check(load(job))


def run_of(seed, loss, setting="optim=grass"):
    return {"stage": "seeds", "setting": setting, "seed": str(seed), "loss": loss, "tokens_per_s": 100 * loss,
            "commit": "abc"}  # fmt: skip


SUMMED = {
    "stage": "seeds", "setting": "optim=adamw", "seeds": ["0", "1"], "loss": 2.5, "error": 0.25,
    "minus": {"optim=grass": [1.0, 0.5]}, "tokens_per_s": 250, "commits": ["abc", "def"],
}  # fmt: skip


def test_the_seeds_of_a_setting_are_one_line_with_their_mean_and_its_standard_error():
    grass = ablation.trial_of("optim=grass", [run_of(0, 1.0), run_of(1, 2.0), run_of(2, 3.0)])
    adamw = ablation.trial_of("optim=adamw", [run_of(0, 2.5, "optim=adamw")])
    assert (grass.setting, grass.loss, [*grass.by_seed.values()]) == ("optim=grass", 2.0, [1.0, 2.0, 3.0])
    assert grass.error == pytest.approx(1 / math.sqrt(3))  # the standard deviation of 1, 2, 3 is 1
    _, table = ablation.table({"Methods": [adamw, grass]}, grass)
    assert table.splitlines()[2:] == [
        "| `optim=grass` | 3 | 2.0000 ± 0.5774 | +0.0000 |",
        "| `optim=adamw` | 1 | 2.5000 | +1.5000 |",
    ]


def test_a_table_shows_overrides_as_a_shell_takes_them():
    setting = "optim=grass optim.rank={*:64,up_proj:16}"
    trial = ablation.Trial(setting, {"0": 2.0})
    _, table = ablation.table({"Ranks": [trial]}, trial)
    typed = "`optim=grass 'optim.rank={*:64,up_proj:16}'`"
    heading, _, row = table.splitlines()
    assert heading == f"| setting | seeds | loss | relative to {typed} |"
    assert row.startswith(f"| {typed} | 1 | 2.0000 |")
    assert shlex.split(typed.strip("`")) == setting.split()


def test_settings_are_compared_seed_by_seed():
    ours = ablation.Trial("ours", {"0": 1.0, "1": 2.0, "2": 3.0})
    theirs = ablation.Trial("theirs", {"2": 2.9, "0": 1.1, "5": 7.0})
    difference, error = ours.minus(theirs)  # of -0.1 and 0.1
    assert difference == pytest.approx(0) and error == pytest.approx(0.1)


def test_sums_that_are_left_of_runs_are_shown_until_there_is_a_run_for_each_of_their_seeds():
    grass = ablation.trial_of("optim=grass", [run_of(0, 1.0), run_of(1, 2.0)])
    one, both = ([run_of(seed, 4.0 + seed, "optim=adamw") for seed in seeds] for seeds in ([0], [0, 1]))
    _, table = ablation.table({"Methods": [ablation.trial_of("optim=adamw", [SUMMED, *one])]}, grass)
    assert table.splitlines()[2] == "| `optim=adamw` | 2 | 2.5000 ± 0.2500 | +1.0000 ± 0.5000 |"
    anew = ablation.trial_of("optim=adamw", [SUMMED, *both])
    assert (anew.loss, anew.commits, anew.minus(grass)) == (4.5, {"abc"}, (3.0, 0.0))


def test_what_is_on_record_is_not_run_again(tmp_path, monkeypatch):
    asked = []

    def run_sweep(overrides, root, jobs):
        asked.append(overrides)
        jobs = ablation.combinations(ablation.parse(overrides))
        # The last of them fails.
        return [Finished("name", [*job], "folder", "log", int(job == jobs[-1] != jobs[0])) for job in jobs]

    class Finished(JobResult):
        @property
        def summary(self):
            return None if self.exit_code else {"val/loss": 3.0, "tokens_per_s": 9.6, "commit": "abc", "machine": "m"}

    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "records.jsonl")
    monkeypatch.setattr(ablation, "run_sweep", run_sweep)
    (tmp_path / "records.jsonl").write_text(json.dumps(SUMMED) + "\n")
    stage = {
        "common": ["train.steps=4"],
        "sweeps": {
            "One": ["optim=adamw,grass train.seed=0,1,2"],
            "Two": ["optim=grass", "optim=grass optim.rank=8,16"],
        },
    }
    ablation.run_missing("seeds", stage, ["train.log_every=2"], tmp_path, 1)
    shared = ["train.log_every=2", "train.steps=4"]
    assert asked == [
        [*shared, "optim=adamw,grass", "train.seed=2,0,1"],  # the least that has adamw with 2, and grass with all
        [*shared, "optim=grass", "optim.rank=8,16"],
    ]
    asked.clear()
    ablation.run_missing("seeds", stage, ["train.log_every=2"], tmp_path, 1)
    assert asked == [[*shared, "optim=grass", "train.seed=1"], [*shared, "optim=grass", "optim.rank=16"]]
    kept = ablation.recorded(tmp_path / "records.jsonl")
    assert kept[0] == SUMMED
    settings = [(r["setting"], r.get("seed")) for r in kept[1:]]
    assert sorted(settings) == sorted(set(settings)) and ("optim=adamw", "2") in settings
    assert kept[1] == {
        "stage": "seeds", "setting": "optim=adamw", "seed": "2", "loss": 3.0, "tokens_per_s": 10, "commit": "abc",
        "machine": "m", "date": kept[1]["date"],
    }  # fmt: skip


def test_every_line_of_the_records_is_one_that_the_study_lists():
    records = ablation.recorded(ablation.RECORDS)
    shown = sum(
        len(trial.seeds)
        for name, stage in STUDY["stages"].items()
        for trials in ablation.trials_of(name, stage, STUDY["common"], records).values()
        for trial in {t.setting: t for t in trials}.values()
    )
    kept = {(r["stage"], r["setting"], seed) for r in records for seed in r.get("seeds", [r.get("seed")])}
    assert shown == len(kept) > 40


def test_the_picture_is_drawn(tmp_path):
    trials = [ablation.trial_of("optim=grass", [run_of(0, 1.0), run_of(1, 2.0)])]
    trials.append(ablation.trial_of("optim=adamw", [SUMMED]))
    ablation.plot({"screen": {"Methods": trials}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
