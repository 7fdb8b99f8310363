"""TensorBoard: what its own reader finds in a run's folder."""

import importlib.util
import json
import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.runs.tensorboard_log import TensorboardLogger
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer
from tests.parallel_runs import TINY


def shown(folder):
    """(step, value) of every point that TensorBoard shows, by the metric's name."""
    reader = EventAccumulator(str(folder)).Reload()
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def write(folder, first_step, *lines):
    log = TensorboardLogger(folder, first_step)
    for line in lines:
        log.log(line)
    log.close()


def loss(step, value):
    return {"step": step, "tokens": 100 * step, "train/loss": value}


def test_a_resumed_run_shows_every_step_once(tmp_path):
    write(tmp_path, 0, {"step": 0, "val/loss": 9.0}, loss(1, 5.0))  # killed before its first checkpoint
    write(tmp_path, 0, {"step": 0, "val/loss": 6.0}, loss(1, 4.0), loss(2, 3.5), {"step": 2, "train/loss": None})
    write(tmp_path, 1, loss(2, 3.0), loss(3, 2.0))  # from the checkpoint of step 1
    assert shown(tmp_path) == {
        "val/loss": [(0, 6.0)],
        "train/loss": [(1, 4.0), (2, 3.0), (3, 2.0)],
        "tokens": [(1, 100.0), (2, 200.0), (3, 300.0)],
    }


def test_a_run_writes_the_numbers_of_its_metric_lines(root, tmp_path):
    text = [f"data.paths=[{root / 'models'}]", f"data.root={tmp_path / 'prepared'}", f"run.root={tmp_path}"]
    short = ["train.steps=3", "train.eval_every=1", "train.eval_sequences=1", "train.log_layers_every=3"]
    config = load([*TINY, *text, *short, "logger.tensorboard=true"])
    folder = RunFolder(config)
    with folder.locked():
        Trainer(config, World(0, 1, torch.device("cpu")), ready(config, 1), folder, StopRequest()).fit()
    expected = {}
    for line in map(json.loads, folder.metrics_file.read_text().splitlines()):
        step = line.pop("step")
        for name, value in line.items():
            expected.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    assert "grad_norm/lm_head" in expected and shown(folder.tensorboard) == expected


def test_a_failure_is_logged_once_and_ends_nothing(tmp_path, caplog):
    log = TensorboardLogger(tmp_path, 0)

    class Broken:
        def add_scalar(self, *_):
            raise OSError("no space left")

    log._writer = Broken()
    with caplog.at_level(logging.WARNING):
        log.log(loss(1, 5.0))
        log.log(loss(2, 5.0))
        log.close()
    assert caplog.text.count("TensorBoard's log ends here: no space left") == 1


def test_without_the_package_the_run_is_refused_with_the_fix(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "pretrain.runs.tensorboard_log.find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    check(load([]), needs_data=False)
    with pytest.raises(ConfigError, match=r"logger\.tensorboard=true needs .*pip install -r requirements-extra\.txt"):
        check(load(["logger.tensorboard=true"]), needs_data=False)
