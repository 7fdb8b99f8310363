"""``--help`` of every command says what it does; of those that take overrides also the groups and the usual ones."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from data import prepare
from data.prepare import meanings
from data.settings import DataSettings
from pretrain.config.compose import CONF, load


def told(*command):
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["./launch.sh"], "Pretrain a LLaMA"),
        ([sys.executable, "-m", "pretrain.sweep"], "Train a run for each combination"),
        ([sys.executable, "-m", "pretrain.estimate"], "Estimate the memory of a run"),
    ],
)
def test_what_takes_overrides_tells_groups_and_overrides_that_exist(command, words, root, monkeypatch):
    monkeypatch.chdir(root)
    text = told(*command, "--help")
    assert words in text and "_schema" not in text
    groups = " ".join(text.split("Groups (group=option):")[1].split("\n\n")[0].split())
    for group in ("data", "experiment", "logger", "model", "optim"):
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        assert f"{group} {', '.join(options)}" in groups
    overrides = re.findall(r"^  ([\w.]+=\S+)", text.split("Settings used most")[1], re.M)
    assert len(overrides) >= 10
    load(overrides)


@pytest.mark.parametrize("module", ["generate", "evaluate", "export", "report"])
def test_what_takes_a_run_tells_every_option(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        importlib.import_module(f"pretrain.{module}").main(["--help"])
    text = capsys.readouterr().out
    assert f"python -m pretrain.{module} runs/" in text
    usage, options = text.split("\n\n")[0], text.split("options:")[1]
    for option in re.findall(r"--[a-z-]+", usage):
        assert re.search(rf"^  .*{option}\b.*\s+\w+", options, re.M), option


def test_preparation_tells_what_each_setting_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", "--help"])
    with pytest.raises(SystemExit):
        prepare.main()
    text = " ".join(capsys.readouterr().out.split())
    assert meanings().keys() == {entry.name for entry in fields(DataSettings)}
    for meaning in (meaning for name, meaning in meanings().items() if name != "mixture"):
        assert " ".join(meaning.split()) in text
