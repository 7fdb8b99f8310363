"""Output that nobody reads, or that the terminal cannot show, ends a command with a sentence or not at all."""

import os
import subprocess
import sys

import pytest

COMMANDS = [
    *(["-m", f"pretrain.{name}", "--help"] for name in ("train", "launch", "sweep", "estimate", "preflight")),
    *(["-m", f"pretrain.{name}", "--help"] for name in ("evaluate", "generate", "export", "report")),
    ["-m", "pretrain.train", "--cfg", "job"],
    ["-m", "pretrain.train", "--cfg", "hydra"],
]
ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def run(root, *arguments, env=None, **options):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env={**os.environ, **(env or {})}, timeout=120, **options)


@pytest.mark.parametrize("arguments", COMMANDS, ids=[" ".join(command[1:]) for command in COMMANDS])
def test_a_closed_pipe_ends_a_command_silently(root, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = run(root, *arguments, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert result.returncode in (0, 141) and result.stderr == b""  # argparse drops its help by itself


def test_a_closed_standard_error_ends_a_command_with_its_exit_code(root):
    reader, writer = os.pipe()
    os.close(reader)
    assert run(root, "-m", "pretrain.train", "train.stepz=1", stderr=writer).returncode == 2
    os.close(writer)


@pytest.mark.parametrize("env", ASCII, ids=[" ".join(map("=".join, env.items())) for env in ASCII])
def test_a_terminal_without_unicode_shows_escapes(root, env):
    asked = [("--help", 0), ("run.nam=日本語", 2), ("optim.rank=é", 2), ("--cfg=job", 0)]
    for argument, code in asked:
        result = run(root, "-m", "pretrain.train", argument, env=env, capture_output=True, text=True, errors="replace")
        assert result.returncode == code, result.stderr
        assert "UnicodeEncodeError" not in result.stderr and "Traceback" not in result.stderr
        assert "did you mean run.name?" in result.stderr or argument != "run.nam=日本語"


@pytest.mark.parametrize("env", ASCII[1:5:2], ids=["ascii", "LC_ALL=C"])
def test_a_run_with_everyday_characters_trains_on_such_a_terminal(root, tmp_path, env):
    corpus = tmp_path / "données 日本語 (1)"
    corpus.mkdir()
    for name in ("é à ü.txt", "夏.txt", "(2) [x].md"):
        (corpus / name).write_text(f"Où est l'été ? 夏は来ない。 {name} " * 200, encoding="utf-8")
    small = [
        "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1",
        "model.num_attention_heads=2", "optim.rank=8", "optim.warmup_steps=1", "train.seq_len=16", "train.steps=2",
        "train.tokens_per_step=32", "train.eval_sequences=2", "train.sample_tokens=4", "train.compile=false",
        "logger.wandb.mode=disabled", "data=text", "data.validation_share=0.4", "data.prompts=[é, 夏]",
    ]  # fmt: skip
    places = [
        f"data.paths=[{corpus}]",
        f"data.root={tmp_path}/préparé",
        f"run.root={tmp_path}/läufe",
        "run.name=été 100%",
    ]
    env = {**env, "OMP_NUM_THREADS": "1"}
    result = run(
        root, "-m", "pretrain.train", *small, *places, env=env, capture_output=True, text=True, errors="replace"
    )
    assert result.returncode == 0, result.stderr
    assert "Logging error" not in result.stderr and "Traceback" not in result.stderr
    folder = tmp_path / "läufe" / "été 100%"
    assert (folder / "summary.json").exists() and "été 100%" in (folder / "config.yaml").read_text(encoding="utf-8")
    again = run(
        root, "-m", "pretrain.train", *small, *places, env=env, capture_output=True, text=True, errors="replace"
    )
    assert again.returncode == 0 and "is finished at step 2" in again.stderr
