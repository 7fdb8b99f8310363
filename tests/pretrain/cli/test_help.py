"""``--help`` of every command says what it does; of those that take overrides also the groups and the usual ones."""

import argparse
import ast
import importlib
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data import prepare
from data.prepare import meanings
from data.settings import DataSettings
from pretrain.config.compose import CONF, flat, load
from pretrain.config.schema import ConfigError

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


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
    lines = text.split("Settings used most")[1].split("\n\n")[0].splitlines()
    overrides = [shlex.split(line)[0] for line in lines if re.match(r"  '?[\w.]+=", line)]
    assert len(overrides) >= 10 and "data.paths=[notes]" in overrides
    assert not re.search(r"(?<![\w.'])[\w.]+=[\[{]", text)  # without quotes, zsh and bash would change it
    load(overrides)
    defaults, shown = flat(OmegaConf.structured(load([]))), re.findall(r"^  ([\w.]+)=.*\(default: (.+)\)$", text, re.M)
    assert {"run.name", "train.steps", "optim.rank", "optim.lr"} <= {key for key, _ in shown}
    assert all(default.lower() == str(defaults[key]).lower() for key, default in shown)


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


@pytest.mark.parametrize(
    "module",
    [
        *(f"pretrain.{name}" for name in ("generate", "evaluate", "export", "report")),
        "data.train_tokenizer",
        "data.inspect",
    ],
)
def test_every_value_that_an_option_has_by_default_is_shown(module):
    parser = importlib.import_module(module).parser()
    shown = 0
    for action in parser._actions:
        if action.default not in (None, False, "", [], argparse.SUPPRESS):
            values = [
                str(value) for value in (action.default if isinstance(action.default, list) else [action.default])
            ]
            text = action.help.replace("%(default)s", str(action.default)).replace("%(default)g", str(action.default))
            assert re.search(r"default: " + re.escape(" ".join(values)), text), f"{action.dest}: {text}"
            shown += 1
    assert shown or module == "pretrain.report"


def test_preparation_tells_what_each_setting_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", "--help"])
    with pytest.raises(SystemExit):
        prepare.main()
    text = " ".join(capsys.readouterr().out.split())
    assert meanings().keys() == {entry.name for entry in fields(DataSettings)}
    for meaning in (meaning for name, meaning in meanings().items() if name != "mixture"):
        assert " ".join(meaning.split()) in text


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("generate", ["--tokens", "-5"], "argument --tokens: -5 must be at least 1"),
        ("generate", ["--tokens", "five"], "argument --tokens: invalid int value: 'five'"),
        ("generate", ["--temperature", "-1"], "argument --temperature: -1 must be at least 0"),
        ("generate", ["--top-k", "-1"], "argument --top-k: -1 must be at least 0"),
        ("generate", ["--top-p", "0"], "argument --top-p: 0 must be above 0 and at most 1"),
        ("generate", ["--page", "--port", "99999"], "argument --port: 99999 must be at least 1 and at most 65535"),
        ("evaluate", ["--text", "x", "--seq-len", "0"], "argument --seq-len: 0 must be at least 1"),
        ("evaluate", ["--text", "x", "--batch-size", "0"], "argument --batch-size: 0 must be at least 1"),
        ("evaluate", ["--data", "absent"], "there is no folder absent"),
        ("export", ["--out", "x", "--shard-gb", "0"], "argument --shard-gb: 0 must be above 0"),
    ],
)
def test_a_value_that_cannot_be_is_named_by_its_flag(module, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"pretrain.{module}").main([str(tmp_path), *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("key", ["train.device", "device", "train.gpus"])
def test_who_gives_a_device_is_told_how_devices_are_chosen(key):
    with pytest.raises(ConfigError, match=f"{key}=cuda: devices are not a setting, .* CUDA_VISIBLE_DEVICES=0"):
        load([f"{key}=cuda"])


@pytest.mark.parametrize("module", sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py")))
def test_benchmarks_answer_help_and_their_libraries_name_a_command(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # restored: benchmarks.saving disables log lines
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{module}", run_name="__main__", alter_sys=True)
    printed = capsys.readouterr()
    if end.value.code:
        message = rf"benchmarks\.{module} is a library and no command; python -m benchmarks\.(\w+) uses it\n"
        command = BENCHMARKS / f"{re.fullmatch(message, printed.err)[1]}.py"
        assert end.value.code == 2 and "main(" in command.read_text().split("if __name__")[1]
    else:
        assert f"benchmarks.{module}" in printed.out


def test_a_flag_takes_the_same_kind_of_value_in_every_command():
    kinds: dict[str, dict[tuple, list[str]]] = {}
    for folder in ("pretrain", "data", "benchmarks", "examples"):
        for path in sorted((CONF.parent / folder).rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".add_argument"):
                    flag = ast.unparse(call.args[0]).strip("'")
                    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
                    # A file may be left out where the command has one of its own.
                    kind = (words.get("action"), words.get("nargs", "").replace("'?'", ""))
                    kinds.setdefault(flag, {}).setdefault(kind, []).append(path.name)
    assert len(kinds["--out"][None, ""]) > 3  # the calls are found
    assert not {flag: kind for flag, kind in kinds.items() if flag.startswith("-") and len(kind) > 1}
