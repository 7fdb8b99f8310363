"""The command that prepares, the settings files, and the standard library as a corpus."""

import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.prepare import prepare
from data.settings import SOURCES, DataSettings
from data.token_dataset import PreparedDataset

REPO = Path(__file__).resolve().parents[2]


def command(*flags: str) -> subprocess.CompletedProcess:
    full = [sys.executable, "-m", "data.prepare", *flags]
    return subprocess.run(full, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_the_command_prints_where_the_preparation_lies_and_what_it_holds(settings):
    flags = ["--name", "own", "--source", "text", "--paths", *settings.paths, "--vocab-size", "400"]
    run = command(*flags, "--validation-share", "0.2", "--root", settings.root)
    prepared = prepare(settings)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{prepared.folder}: train {len(prepared.train):,} tokens of ")
    assert "vocabulary 400" in run.stdout


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
    run = command("--source", "text", "--paths", str(tmp_path / "missing"), "--root", str(tmp_path))
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("--paths: there is no file or folder") and "Traceback" not in run.stderr
    assert run.stderr.rstrip().endswith("check --paths")
    help_text = command("--help").stdout
    names = {field.name for field in fields(DataSettings)} - {"mixture"}
    assert all(f"--{name.replace('_', '-')}" in help_text for name in names)


@pytest.mark.parametrize("file", sorted((REPO / "conf" / "data").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_yaml_files_set_what_is_usually_set_and_nothing_unknown(file):
    values = yaml.safe_load(file.read_text())
    usual = {"name", "source", "tokenizer", "vocab_size", "validation_share", "root", "seed"}
    of_runs = {"defaults", "prompts", "on_the_fly", "shuffle_block"}
    assert usual <= set(values) <= {field.name for field in fields(DataSettings)} | of_runs
    assert values["name"] == file.stem and values["source"] in SOURCES


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory) -> tuple[PreparedDataset, DataSettings, float]:
    settings = DataSettings(root=str(tmp_path_factory.mktemp("prepared")))
    start = time.perf_counter()
    return prepare(settings), settings, time.perf_counter() - start


def test_the_standard_library_is_prepared_within_a_minute_and_compact(stdlib):
    prepared, _, seconds = stdlib
    assert seconds < 60
    for split in (prepared.train, prepared.val):
        assert split.text_bytes / len(split) > 2.7
    assert 0.01 < prepared.val.text_bytes / prepared.train.text_bytes < 0.12
    assert prepared.train[0:1].dtype == np.uint16 and prepared.tokenizer.vocab_size == 4096


def test_the_standard_library_is_reused_within_a_second(stdlib):
    prepared, settings, _ = stdlib
    start = time.perf_counter()
    assert prepare(settings).fingerprint == prepared.fingerprint
    assert time.perf_counter() - start < 1
