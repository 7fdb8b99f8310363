"""W&B: the content of an offline run; failures, which end nothing."""

import json
import logging
import re
import shutil
import struct
import sys
import time

import pytest
import torch
import yaml
from wandb.proto import wandb_internal_pb2

from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.runs.json_lines import JsonLinesFile
from pretrain.runs.wandb_log import WandbLogger, _LogsTab
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return load([f"run.root={tmp_path}"])


def records(file):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB after a header of seven bytes."""
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
        if kind in (1, 4):  # a complete record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def complete(folder):
    """The records of the offline run in ``folder``, or in its folder wandb, when all are written."""
    (file,) = [*folder.glob("wandb/offline-run-*/run-*.wandb"), *folder.glob("run-*.wandb")]
    deadline = time.monotonic() + 60  # W&B's own process may write the last records after finish() returned
    while not any(r.WhichOneof("record_type") == "exit" for r in records(file)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return list(records(file))


def items(part):
    """The values by name; a table, which W&B cuts into parts, by its last part."""
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in part}


def history(folder):
    """(tokens, loss) of every line in the offline run's own file, and the run's id."""
    lines, run_id = [], None
    for record in complete(folder):
        if record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
        if record.WhichOneof("record_type") == "history":
            line = items(record.history.item)
            lines.append((line["tokens"], line["train/loss"]))
    return lines, run_id


def test_without_a_login_the_run_is_offline_and_holds_what_was_logged(config, tmp_path):
    run = WandbLogger(config, tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step, "tokens": 100 * step, "train/loss": 5.0 - step})
    run.finish({"val/loss": 2.0})
    lines, run_id = history(tmp_path)
    assert lines == [(100, 4.0), (200, 3.0), (300, 2.0)]
    assert run_id == (tmp_path / "wandb_id.txt").read_text()


def summary(folder):
    """The summary of the offline run in ``folder``, as its records leave it."""
    values = {}
    for record in complete(folder):
        values |= items(record.summary.update)
    return values


def test_the_summary_has_the_lowest_validation_loss_also_after_a_resume(config, tmp_path):
    for part, losses in (("first", [5.0, 3.0, 4.0]), ("resumed", [6.0])):
        run = WandbLogger(config, tmp_path)
        for loss in losses:
            line = {"step": 1, "tokens": 100, "val/loss": loss}
            run.log(line)
            JsonLinesFile(tmp_path / "metrics.jsonl").write(line)
        run.finish({"val/loss": losses[-1]})
        found = summary(tmp_path)
        assert (found["val/loss"], found["val/loss_min"]) == (losses[-1], 3.0), part
        shutil.rmtree(tmp_path / "wandb")


def test_tags_and_numbers_of_parameters_are_there_from_the_start(tmp_path):
    config = load([f"run.root={tmp_path}", "logger.wandb.mode=offline", "logger.wandb.tags=[8 GB, 2024_1]"])
    run = WandbLogger(config, tmp_path, {"parameters": 1000, "trainable": 20})
    run.finish({})
    (start,) = (r.run for r in complete(tmp_path) if r.WhichOneof("record_type") == "run")
    settings = items(start.config.update)
    assert list(start.tags) == ["8 GB", "2024_1"]
    assert (settings["parameters"], settings["trainable"]) == (1000, 20)
    assert settings["model"]["name"] == config.model.name


def test_a_tag_that_wandb_refuses_is_an_error_before_the_run():
    with pytest.raises(ConfigError, match=r"logger\.wandb\.tags: 'x+' has 65 characters; a tag has 1 to 64"):
        check(load([f"logger.wandb.tags=[{'x' * 65}]"]), needs_data=False)
    check(load([f"logger.wandb.tags=[{'x' * 64}]"]), needs_data=False)


def logs_tab(folder):
    """The text of the Logs tab of the offline run in ``folder``."""
    return "".join(r.output_logger.line for r in complete(folder) if r.WhichOneof("record_type") == "output_logger")


def test_the_logs_tab_has_the_log_lines_of_this_process(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "train.log").write_text("of the process before\nopening\n")
    run = WandbLogger(config, tmp_path, log_start=len("of the process before\n"))
    streams = sys.stdout, sys.stderr
    logging.getLogger("pretrain").warning("step %d é", 7)
    assert (sys.stdout, sys.stderr) == streams
    run.finish({})
    logging.getLogger("pretrain").warning("after the end")
    lines = logs_tab(tmp_path).splitlines()
    assert lines[0] == "opening" and lines[-1].endswith("WARNING step 7 é")
    assert any("INFO W&B is offline; the run goes online with: " in line for line in lines)
    assert not any("process before" in line or "after the end" in line for line in lines)


def alerts(folder):
    """(title, text, level) of every alert of the offline run in ``folder``."""
    found = [r.alert for r in complete(folder) if r.WhichOneof("record_type") == "alert"]
    return [(alert.title, alert.text, alert.level) for alert in found]


def test_a_line_marked_as_an_alert_is_one_at_most_once_in_ten_minutes(config, tmp_path, monkeypatch):
    now = 5.0
    monkeypatch.setattr("pretrain.runs.wandb_log.time.monotonic", lambda: now)
    run = WandbLogger(config, tmp_path)
    for now in (5.0, 604.0, 605.0):
        logging.getLogger("pretrain").warning("step %d", now, extra={"alert": "Step skipped"})
    logging.getLogger("pretrain").warning("back", extra={"alert": "Rolled back"})
    logging.getLogger("pretrain").warning("no alert")
    monkeypatch.undo()
    run.finish({})
    skipped = [("Step skipped", "step 5", "WARN"), ("Step skipped", "step 605", "WARN")]
    assert alerts(tmp_path) == [*skipped, ("Rolled back", "back", "WARN")]


def test_a_failure_of_the_logs_tab_ends_nothing(config, tmp_path):
    run = WandbLogger(load(["logger.wandb.mode=disabled"]), tmp_path)

    class Broken:
        def write_logs(self, text):
            raise OSError("no space left")

    run._run = Broken()
    run._send_log_lines()
    logging.getLogger("pretrain").warning("a line", extra={"alert": "Step skipped"})
    run.finish({})
    assert not any(isinstance(handler, _LogsTab) for handler in logging.getLogger().handlers)


def test_a_disabled_run_writes_nothing(tmp_path):
    run = WandbLogger(load(["logger.wandb.mode=disabled"]), tmp_path)
    run.log({"step": 1})
    run.finish({})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_logged_once_and_ends_nothing(config, tmp_path, caplog):
    run = WandbLogger(load(["logger.wandb.mode=disabled"]), tmp_path)

    class Broken:
        def log(self, line):
            raise OSError("no space left")

    run._run = Broken()
    with caplog.at_level(logging.WARNING):
        run.log({"step": 1})
        run.log({"step": 2})
    assert caplog.text.count("no space left") == 1 and run._run is None


BY_LAYER = re.compile(r"^(grad_norm|weight_norm|update_ratio)/.*")


def documented(root, section):
    """The names in the tables of a section of docs/metrics.md."""
    rows = re.findall(r"^\| (`.*?`) \|", section, re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_an_offline_run_has_the_metrics_in_the_docs(root, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("pretrain.training.step_log.peak_flops", lambda *_: 1e12)  # a device whose peak is known
    config = load([
        "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1", "optim.rank=8",
        "model.num_attention_heads=2", "model.vocab_size=400", "train.seq_len=32", "train.tokens_per_step=64",
        "train.steps=4", "train.compile=false", "train.eval_sequences=2", "train.eval_every=2", "train.log_every=1",
        "train.log_layers_every=4", "train.sample_tokens=2", "optim.warmup_steps=1", "optim.selection=top_r",
        "data=text", f"data.paths=[{root / 'models'}]",
        "data.validation_share=0.2", f"data.root={tmp_path / 'prepared'}", f"run.root={tmp_path}",
        "run.name=sweep/job", "logger.wandb.mode=offline", "logger.wandb.log_checkpoint=true",
    ])  # fmt: skip
    folder = RunFolder(config)
    with folder.locked():
        Trainer(config, World(0, 1, torch.device("cpu")), ready(config, 1), folder, StopRequest()).fit()
    found = complete(folder.path)
    logged = [items(r.history.item) for r in found if r.WhichOneof("record_type") == "history"]
    text = (root / "docs/metrics.md").read_text()
    lines, on_wandb = text.split("## Weights & Biases")
    lines, summary = lines.split("`selection.jsonl`")
    own = {BY_LAYER.sub(r"\1/<layer>", name) for line in logged for name in line if not name.startswith("_")}
    assert own == documented(root, lines) | documented(root, on_wandb)
    summarized = {name for r in found for name in items(r.summary.update)}
    assert documented(root, summary) | {"val/loss"} <= summarized
    (start,) = (r.run for r in found if r.WhichOneof("record_type") == "run")
    assert (start.display_name, start.run_group, start.job_type) == ("job", "sweep", "grass")
    held = items(start.config.update)["estimated_bytes"]
    assert held.keys() == {"weights", "gradients", "optimizer state"} and min(held.values()) > 0
    assert {(m.name or m.glob_name, m.step_metric) for r in found if (m := r.metric).ByteSize()} >= {("*", "tokens")}
    table = json.loads(next(folder.path.glob("wandb/*/files/media/table/validation*")).read_text())
    ours = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert table["data"] == [[line[c] for c in table["columns"]] for line in ours if "val/loss" in line]
    assert any("checkpoint-" in r.request.log_artifact.artifact.name or r.artifact.name for r in found)


def test_the_sweep_files_command_is_one_that_we_would_run(root):
    sweep = yaml.safe_load((root / "scripts/wandb_sweep.yaml").read_text())
    assert sweep["command"][:2] == ["./launch.sh", "-m"]
    chosen = [f"{name}={p['values'][0] if 'values' in p else p['min']}" for name, p in sweep["parameters"].items()]
    fixed = [word for word in sweep["command"][2:] if "args" not in word]
    assert sweep["metric"]["name"] in documented(root, (root / "docs/metrics.md").read_text())
    check(load([*fixed, *chosen]))
