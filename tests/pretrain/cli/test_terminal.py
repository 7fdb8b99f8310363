"""A run as a person at a terminal sees it: its beginning, a moving bar, an answer to Ctrl-C, and the next commands."""

import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from pretrain.cli import console as terminal
from pretrain.cli.console import RunBar, as_text, log_to_file

SMALL = [
    "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "optim.rank=8", "optim.selection=top_r", "train.seq_len=16",
    "train.tokens_per_step=32", "train.eval_sequences=2", "train.sample_tokens=4", "train.compile=false",
    "logger.wandb.mode=disabled", "data=text", "data.validation_share=0.4", "train.eval_every=2",
    "data.prompts=['the first']",
]  # fmt: skip


class Terminal:
    """A command that runs in a terminal of 300 columns; ``text`` is what it has shown so far."""

    def __init__(self, root, command):
        self._screen, far_end = os.openpty()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "TERM": "xterm"}
        self.process = subprocess.Popen(command, cwd=root, env=env, stdin=far_end, stdout=far_end, stderr=far_end)
        os.close(far_end)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        try:
            while read := os.read(self._screen, 4096):
                self.text += read.decode(errors="replace")
        except OSError:  # Linux: nobody has the other end any more
            pass

    def wait_for(self, words, seconds=120):
        ends = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < ends and self.process.poll() is None, self.text
            time.sleep(0.02)

    def end(self):
        code = self.process.wait(timeout=120)
        self._reader.join(timeout=10)
        os.close(self._screen)
        return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text).replace("\r", "\n")


@pytest.fixture
def run(root, tmp_path):
    (tmp_path / "texts").mkdir()
    for n in range(8):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"the cat {n} sat on the mat and the dog saw it sit. " * 200)
    places = [f"data.paths=[{tmp_path}/texts]", f"data.root={tmp_path}/prepared", f"run.root={tmp_path}/my runs"]
    command = [sys.executable, "-m", "pretrain.train", *SMALL, *places, "run.name=try"]
    return lambda *more: Terminal(root, [*command, *more])


def test_a_terminal_shows_the_size_of_a_run_its_validations_and_the_next_commands(run, root, tmp_path):
    code, text = run("train.steps=4").end()
    assert code == 0, text
    opening = text[: text.index("choosing the initial rows")]
    assert re.search(r"model +\S+: [\d,]+ parameters, [\d,]+ trained \(\d+%\)", opening)
    assert re.search(r"tokens +128 in 4 steps; the corpus: [\d,]+ tokens", opening)
    assert "micro-batches of 2 × 16 tokens" in opening and re.search(r"device +1 × CPU, float32", opening)
    memory = (
        r"memory +([\d.]+) MiB per device by formula \(weights ([\d.]+), gradients ([\d.]+), optimizer state ([\d.]+)\)"
    )
    total, *parts = (float(size) for size in re.search(memory, opening).groups())
    assert total == pytest.approx(sum(parts), abs=0.2) and ") + activations\n" in opening
    for step in (0, 2, 4):
        assert re.search(rf"^step {step} · val loss \d", text, re.M)
    assert "4/4" in text and re.search(r"\d:\d\d:\d\d .*left", text)
    folder = tmp_path / "my runs" / "try"
    commands = [shlex.split(line) for line in text.splitlines() if " -m pretrain." in line]
    assert [command[2:] for command in commands] == [
        ["pretrain.report", str(folder)],
        ["pretrain.generate", str(folder), "--prompt", "the first"],
        ["pretrain.export", str(folder), "--out", f"{folder}-exported"],
    ]
    subprocess.run([*commands[1], "--tokens", "2"], cwd=root, check=True, timeout=120)


def test_ctrl_c_is_answered_at_once_and_the_run_saves_after_its_step(run):
    running = run("train.steps=100000", "train.eval_every=0")
    running.wait_for("choosing the initial rows")
    running.wait_for("loss")
    running.process.send_signal(2)
    code, text = running.end()
    assert code == 85
    step = int(re.search(r"finishing step (\d+), then saving; Ctrl-C again stops at once", text)[1])
    assert f"stopped by a signal at step {step}" in text


def test_the_bar_moves_at_every_step_and_smooths_the_loss(monkeypatch):
    monkeypatch.setattr(terminal, "console", Console(file=io.StringIO(), force_terminal=True, width=90))
    bar = RunBar(steps=100, first_step=7)
    task = bar._bar.tasks[0]
    try:
        assert task.completed == 7
        bar.advance(8)
        assert task.completed == 8
        bar.show({"loss": 5.0, "tokens/s": 12345.0})
        bar.show({"loss": 4.0, "tokens/s": 12345.0})
        assert task.fields["shown"] == "loss 4.800 · tokens/s 12,345"
        bar.show({"loss": float("nan"), "tokens/s": 1.0})  # a step without an update
        assert task.fields["shown"] == "loss 4.800 · tokens/s 1.000"
    finally:
        bar.stop()


def test_a_huge_perplexity_is_not_written_out():
    assert as_text({"val loss": 20.0, "val perplexity": 4.85e8}) == "val loss 20.000 · val perplexity >1e6"
    assert as_text({"val perplexity": 1e6, "tokens/s": 2e6}) == "val perplexity 1,000,000 · tokens/s 2,000,000"
    assert as_text({"loss": 736.0106, "tokens/s": 736.0106}) == "loss 736.011 · tokens/s 736"


def test_a_log_file_that_another_library_closed_and_that_is_gone_ends_nothing(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    log_to_file(tmp_path / "run" / "train.log")
    handler = logging.getLogger().handlers[-1]
    handler.close()  # as logging.config.dictConfig does with all handlers
    shutil.rmtree(tmp_path / "run")
    logging.getLogger("pretrain").warning("a line")
    logging.getLogger("pretrain").warning("another line")
    assert caplog.text.count("train.log cannot be written (No such file or directory); ") == 1
    assert "another line" in caplog.text
    logging.getLogger().removeHandler(handler)
