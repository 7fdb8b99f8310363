"""W&B: what an offline run holds, that a resumed run is the same one, and that a failure ends nothing."""

import json
import logging
import struct
import time

import pytest
from wandb.proto import wandb_internal_pb2

from pretrain.config import load
from pretrain.wandb_run import WandbRun


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return load([f"run.root={tmp_path}"])


def records(file):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB behind a header of seven bytes."""
    data, place, pending = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a block's tail too short for a header
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return
        pending += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def history(folder):
    """(tokens, loss) of every line in the offline run's own file, and the run's id."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # W&B's own process may write the last records after finish() returned
    while not any(r.WhichOneof("record_type") == "exit" for r in records(file)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lines, run_id = [], None
    for record in records(file):
        if record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append((items["tokens"], items["train/loss"]))
    return lines, run_id


def test_without_a_login_the_run_is_offline_and_holds_what_was_logged(config, tmp_path):
    run = WandbRun(config, tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step, "tokens": 100 * step, "train/loss": 5.0 - step})
    run.finish({"val/loss": 2.0})
    lines, run_id = history(tmp_path)
    assert lines == [(100, 4.0), (200, 3.0), (300, 2.0)]
    assert run_id == (tmp_path / "wandb_id.txt").read_text()


def test_a_disabled_run_writes_nothing(tmp_path):
    run = WandbRun(load(["logger.wandb.mode=disabled"]), tmp_path)
    run.log({"step": 1})
    run.finish({})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_said_once_and_ends_nothing(config, tmp_path, caplog):
    run = WandbRun(load(["logger.wandb.mode=disabled"]), tmp_path)

    class Broken:
        def log(self, line):
            raise OSError("no space left")

    run._run = Broken()
    with caplog.at_level(logging.WARNING):
        run.log({"step": 1})
        run.log({"step": 2})
    assert caplog.text.count("no space left") == 1
