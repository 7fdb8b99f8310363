"""Runs that train while their corpus is prepared end the same, to the bit, whatever is killed, stopped or broken."""

import gzip
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import data.streaming.background
from data.prepare import command, parser, prepare
from data.settings import DataSettings
from data.streaming.background import BackgroundPreparation
from data.train_tokenizer import train_tokenizer
from pretrain import train
from pretrain.cli.signals import EXIT_CODE, StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.planner.plan import _epochs
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import stream
from pretrain.training.trainer import Trainer
from tests.kills import losses, tensors
from tests.parallel_runs import CPU, TINY, assert_same_losses
from tests.processes import in_processes

SEQ_LEN, BLOCK, STEPS = 32, 96, 30
SMALL = [
    *TINY, "train.dtype=float32", "train.tokens_per_step=2048", f"train.steps={STEPS}", "train.checkpoint_every=4",
    "train.sample_tokens=0", "data.name=own", "data.on_the_fly=true", f"data.shuffle_block={BLOCK}",
]  # fmt: skip

# A preparation that commits what it has often, and takes its time.
SLOWLY = """
import sys, time
import data.sources.corpus, data.preparation.corpus_writer
data.sources.corpus.BATCH_CHARS, data.sources.corpus.SURVEY_BYTES = 2**12, 0
data.preparation.corpus_writer.COMMIT_SECONDS, data.preparation.corpus_writer.BYTES_PER_WORKER = 0, 2**12
add = data.preparation.corpus_writer.CorpusWriter._add
def slow_add(*given):
    time.sleep(float(sys.argv[1]))
    add(*given)
data.preparation.corpus_writer.CorpusWriter._add = slow_add
from data.streaming.background import main
main()
"""


# Whole runs, each in a process of its own.


def _live(overrides, pause, mark, said):
    torch.set_num_threads(1)
    os.environ["PREPARES_FOR"] = mark
    if pause:
        data.streaming.background.COMMAND = [sys.executable, "-c", SLOWLY, str(pause)]
    with open(said, "a") as sys.stderr:
        sys.exit(train.run(load(overrides)))


class Runs:
    """Starts runs in `folder` on `corpus`; `said` is what they wrote to standard error."""

    def __init__(self, folder, corpus):
        self.root, self.said = folder, folder / "said"
        self._common = [*SMALL, f"data.paths=[{corpus}]", f"run.root={folder}", "run.name=run"]
        self._common += [f"data.root={folder / 'prepared'}"]
        self.folder = RunFolder(self.config())
        folder.mkdir(exist_ok=True)

    def config(self, *more):
        return load([*self._common, *more])

    def start(self, pause, *more):
        arguments = ([*self._common, *more], pause, str(self.root), self.said)
        process = multiprocessing.get_context("forkserver").Process(target=_live, args=arguments)
        process.start()
        return process

    def __call__(self, *more, pause=0.0):
        process = self.start(pause, *more)
        process.join(60)
        assert process.exitcode is not None, "it hangs"
        assert not self.preparing()
        return process.exitcode

    def preparing(self):
        """Processes that still prepare, or tokenise, for these runs, a moment later."""
        deadline = time.monotonic() + 5
        while (found := list(self._preparing())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _preparing(self):
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"PREPARES_FOR={self.root}".encode() in file.read_bytes().split(b"\0"):
                    yield file.parent.name
            except OSError:
                continue

    def at_work(self, steps):
        """Wait until so many steps are made and a checkpoint is there; the text has not been prepared by then."""
        deadline = time.monotonic() + 60
        while len(self.steps()) < steps or not self.folder.latest_checkpoint:
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.01)
        assert self.unfinished()

    def unfinished(self):
        return list((self.root / "prepared").glob(".own-*.tmp/state.json"))

    def steps(self):
        file = self.folder.metrics_file
        return [line for line in file.read_text().splitlines() if "train/loss" in line] if file.exists() else []

    def end(self):
        """What shows that two runs were the same to the bit."""
        return losses(self.folder), tensors(self.folder)[f"step-{STEPS:08d}"]


def contents(folder):
    files = (file for file in folder.iterdir() if file.name != "manifest.json" and not file.name.startswith(".seen"))
    manifest = {**json.loads((folder / "manifest.json").read_text()), "settings": None}
    return {file.name: file.read_bytes() for file in files}, manifest


def test_a_run_killed_while_it_prepares_ends_as_if_nothing_had_happened(settings, tmp_path):
    undisturbed, killed = (Runs(tmp_path / name, tmp_path / "corpus") for name in ("whole", "killed"))
    assert undisturbed() == 0, undisturbed.said.read_text()
    process = killed.start(0.25, "data.workers=2")
    killed.at_work(steps=4)
    assert len(list(killed._preparing())) == 3
    process.kill()
    process.join()
    assert not killed.preparing() and killed.unfinished()
    assert killed(pause=0.01) == 0, killed.said.read_text()
    assert killed.end() == undisturbed.end()
    (made,) = (killed.root / "prepared").glob("own-*")  # the second epoch had to wait for it
    plain = prepare(DataSettings(**{**vars(settings), "root": str(tmp_path / "plain"), "shard_tokens": 2**28}))
    assert contents(made) == contents(plain.folder)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_no_trace(settings, tmp_path):
    """Two minutes: pytest -m slow -s tests/data/streaming shows where the kills hit."""
    undisturbed = Runs(tmp_path / "whole", tmp_path / "corpus")
    assert undisturbed() == 0, undisturbed.said.read_text()
    draw, kills, rounds, ended, moments = random.Random(3), 0, 0, True, Counter()
    while kills < 20 or not ended:
        if ended:
            run, rounds = Runs(tmp_path / f"run-{rounds}", tmp_path / "corpus"), rounds + 1
        process = run.start(0.05)
        process.join(draw.uniform(0.5, 4) if kills < 20 else 60)
        when = "preparing" if run.unfinished() else "before or after"
        moments[f"{len(run.steps()) // 10 * 10} steps or more, {when}"] += 1
        if ended := process.exitcode is not None:
            assert process.exitcode == 0, run.said.read_text()
            assert run.end() == undisturbed.end()
            continue
        process.kill()
        process.join()
        kills += 1
        assert not run.preparing()
    assert any("preparing" in moment for moment in moments)
    print(f"\n{kills} kills, {rounds} runs:", dict(moments))


@pytest.fixture
def broken(texts, tmp_path):
    """A folder of JSON lines whose last file is cut short, what makes a run read it, and that file when whole."""
    corpus = tmp_path / "records"
    corpus.mkdir()
    for number in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[5 * number : 5 * number + 5])
        (corpus / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    train_tokenizer(texts, tmp_path / "t.model", 400, seed=0)  # to train one would mean to read all of it before
    whole = (corpus / "3.jsonl.gz").read_bytes()
    (corpus / "3.jsonl.gz").write_bytes(whole[:-1000])
    records = ["data.source=records", "data.patterns=['*.jsonl.gz']", f"data.tokenizer={tmp_path / 't.model'}"]
    return corpus, records, whole


def test_a_broken_file_ends_the_run_with_its_name_and_a_whole_copy_lets_it_go_on(broken, tmp_path):
    corpus, records, whole = broken
    undisturbed, run = (Runs(tmp_path / name, corpus) for name in ("undisturbed", "run"))
    assert run(*records, pause=0.2) == 2
    assert "3.jsonl.gz cannot be read after line" in run.said.read_text() and run.unfinished()
    made = len(run.steps())
    assert made and run.folder.latest_checkpoint.name == f"step-{made:08d}"
    (corpus / "3.jsonl.gz").write_bytes(whole)
    first = (corpus / "0.jsonl.gz").read_bytes()
    (corpus / "0.jsonl.gz").write_bytes(gzip.compress(gzip.decompress(first).replace(b"import", b"export", 1)))
    assert run(*records) == 2 and "was trained on another corpus" in run.said.read_text()
    (corpus / "0.jsonl.gz").write_bytes(first)
    assert run(*records) == 0, run.said.read_text()
    assert undisturbed(*records) == 0, undisturbed.said.read_text()
    assert run.end() == undisturbed.end()


def test_a_signal_is_heard_while_the_run_waits_and_ends_the_preparation(settings, tmp_path):
    run = Runs(tmp_path / "run", tmp_path / "corpus")
    process = run.start(pause=0.5)
    run.at_work(steps=1)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == EXIT_CODE and not run.preparing()
    log = run.folder.log_file.read_text()
    assert "stopped by a signal" in log and "python -m data.prepare --name=own --source=text" in log
    assert run.folder.latest_checkpoint.name == f"step-{len(run.steps()):08d}"
    assert max(json.loads(line)["perf/data_s"] for line in run.steps()) > 0.2


def _on_ranks(rank, overrides, pause, size):
    data.streaming.background.COMMAND = [sys.executable, "-c", SLOWLY, str(pause)]
    config, world = load(overrides), World(rank, size, CPU)
    try:
        with stream(config, world) as opened:
            assert not opened.train.complete
            Trainer(config, world, opened, RunFolder(config), StopRequest()).fit()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_two_processes_train_as_one(settings, tmp_path):
    """Seven seconds, as the next one: pytest -m slow tests/data/streaming"""
    one, two = (Runs(tmp_path / str(size), tmp_path / "corpus") for size in (1, 2))
    precise = ["train.dtype=float64"]
    assert one(*precise) == 0, one.said.read_text()
    (tmp_path / "ranks").mkdir()
    said = in_processes(2, tmp_path / "ranks", _on_ranks, [*two._common, *precise], 0.01, 2)
    assert said == ["", ""]
    assert_same_losses(two.folder, one.folder)


@pytest.mark.slow
def test_two_processes_end_together_at_a_broken_file(broken, tmp_path):
    corpus, overrides, _ = broken
    run = Runs(tmp_path / "run", corpus)
    (tmp_path / "ranks").mkdir()
    said = in_processes(2, tmp_path / "ranks", _on_ranks, [*run._common, *overrides], 0.2, 2)
    assert said[0] == said[1] and "3.jsonl.gz cannot be read after line" in said[0]
    assert run.folder.latest_checkpoint.name == f"step-{len(run.steps()):08d}" != f"step-{STEPS:08d}"


# What is refused and told.


@pytest.mark.parametrize("source", ["mixture", "instructions"])
def test_what_has_another_order_is_refused_with_all_else(source, settings):
    wrong = [*SMALL, f"data={source}", "data.on_the_fly=true", "data.shuffle_block=0", "train.seq_len=2048"]
    with pytest.raises(ConfigError) as refused:
        check(load(wrong))
    lines = str(refused.value)
    assert f"data.on_the_fly=true: the order of data.source={source}" in lines and "data.shuffle_block=0" in lines
    assert "train.seq_len=2048" in lines


def test_a_dry_run_tells_when_it_would_begin(settings, tmp_path):
    told = _epochs(Runs(tmp_path / "run", tmp_path / "corpus").config())
    assert (
        f"not prepared yet; training begins during the preparation, from the first {BLOCK * SEQ_LEN:,} tokens on"
        in told
    )


def test_the_command_that_is_told_means_the_same_settings(settings):
    settings.streaming, settings.validation_paths = False, ["a b", "c"]
    _, _, _, *arguments = shlex.split(command(settings))
    assert DataSettings(**vars(parser().parse_args(arguments))) == settings


def test_a_preparation_of_other_files_than_the_run_s_is_said(settings):
    beside = BackgroundPreparation(settings, start=False)
    beside._process = subprocess.Popen([sys.executable, "-c", ""])
    beside._process.wait()
    assert "data.paths" in beside.problem() and "changed while the run started" in beside.problem()
    prepare(settings)
    assert beside.problem() is None
