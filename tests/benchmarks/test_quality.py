"""The study of quality: every run that it lists can start, its records are listed, and its texts are what they say."""

import io
import tarfile
from pathlib import Path

import pytest
import yaml

from benchmarks import ablation, corpora, frontier, quality
from pretrain.config.compose import load
from pretrain.setup.checks import check
from pretrain.sweep import combinations, parse
from tests.benchmarks.test_ablation import lines_of

STUDY = yaml.safe_load(Path(quality.__file__).with_suffix(".yaml").read_text())


@pytest.mark.parametrize("line", lines_of(STUDY), ids=lambda line: " ".join(line[11:]))
def test_the_first_and_last_run_of_every_line_can_start(line):
    jobs = combinations(parse(list(line)))
    for job in (jobs[0], jobs[-1]):
        check(load(job), needs_data=False)


def test_every_line_of_the_records_is_one_that_the_study_lists():
    records = ablation.recorded(ablation.DOCS / "quality.jsonl")
    listed = {
        (name, setting, seed)
        for name, stage in STUDY["stages"].items()
        for lines in stage["sweeps"].values()
        for line in lines
        for job in combinations(parse([*STUDY["common"], *stage["common"], *line.split()]))
        for setting, seed in [ablation.split(job, [*STUDY["common"], *stage["common"]])]
    }
    assert {(r["stage"], r["setting"], r["seed"]) for r in records} <= listed


def test_the_frontier_shows_settings_that_the_study_lists():
    stage = STUDY["stages"][STUDY["frontier"]["stage"]]
    fixed = [*STUDY["common"], *stage["common"]]
    lines = [line for lines in stage["sweeps"].values() for line in lines]
    jobs = [job for line in lines for job in combinations(parse([*fixed, *line.split()]))]
    shown = [s for line in STUDY["frontier"]["lines"].values() for s in line.values()]
    assert {*shown, *STUDY["frontier"]["beside"].values()} <= {ablation.split(job, fixed)[0] for job in jobs}


def test_a_line_of_the_frontier_has_the_shares_that_have_been_run(tmp_path):
    losses = {"quarter": 2.5, "dense": 2.2, "adamw": 2.4}
    line = {1: "dense", 0.5: "half", 0.25: "quarter"}
    assert frontier.points(line, losses) == ([0.25, 1], [2.5, 2.2])
    listing = {"title": "", "lines": {"at equal tokens": line}, "beside": {"AdamW": "adamw", "GaLore": "galore"}}
    frontier.plot_frontier(losses, listing, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5_000


def test_a_corpus_has_what_was_written_and_not_what_was_generated(tmp_path):
    files = {
        "grpcio-1/src/call.cc": b"a",
        "grpcio-1/src/table.upb.h": b"b",
        "grpcio-1/src/large.c": b"c" * (corpora.LARGEST + 1),
        "grpcio-1/README.md": b"d",
        "grpcio-1/include/call.h": b"e",
    }
    with tarfile.open(tmp_path / "grpcio-1.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = list(corpora.texts(tmp_path / "grpcio-1.tar.gz", corpora.CORPORA["c"][1]))
    assert found == [("grpcio-1/include/call.h", b"e"), ("grpcio-1/src/call.cc", b"a")]
    assert corpora.fetch("grpcio==1", tmp_path) == tmp_path / "grpcio-1.tar.gz"
