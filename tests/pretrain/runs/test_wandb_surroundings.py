"""W&B without a network, a login or its own process, and under its own environment variables.

A run keeps everything in any case: its lines are in metrics.jsonl, and in an offline run that can be uploaded later.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from pretrain.config.compose import load
from pretrain.runs.wandb_log import WandbLogger
from tests.pretrain.runs.test_wandb_log import complete, history, items
from tests.pretrain.runs.wandb_server import serve

KEY = "0123456789" * 4
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
LINES = [(100, 4.0), (200, 3.0), (300, 2.0)]


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "3")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def folder(tmp_path):
    (path := tmp_path / "runs" / "my run").mkdir(parents=True)
    return path


def logged(folder, *overrides):
    """A run that logs LINES and finishes."""
    run = WandbLogger(load([f"run.root={folder.parent}", *overrides]), folder)
    for step, (tokens, loss) in enumerate(LINES, 1):
        run.log({"step": step, "tokens": tokens, "train/loss": loss})
    run.finish({"val/loss": 2.0})


def offline_lines(folder):
    return [line for line in history(folder)[0] if line]


ANSWERS = {
    "401": (401, b'{"errors": [{"message": "user is not logged in"}]}'),
    "403": (403, b"forbidden"),
    "404": (404, b"not found"),
    "500": (500, b""),
    "503": (503, b"down for maintenance"),
    "a page of a hotel's network": (200, b"<html>please log in</html>"),
    "an empty answer": (200, b""),
    "an error in the answer": (200, b'{"errors": [{"message": "permission denied"}]}'),
}
LACKS = {
    "nothing listens": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": NOWHERE},
    "no such host": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://wandb.invalid"},
    "a proxy that is gone": {"WANDB_API_KEY": KEY, "HTTP_PROXY": NOWHERE, "WANDB_BASE_URL": "http://wandb.invalid"},
    "a key that is too short": {"WANDB_API_KEY": "abc", "WANDB_BASE_URL": NOWHERE},
    "no key": {},
    "no key, but online is asked for": {"WANDB_MODE": "online"},
}


@pytest.mark.parametrize("surroundings", LACKS.values(), ids=LACKS)
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_network_or_a_login_the_run_is_offline_and_complete(surroundings, mode, folder, monkeypatch, caplog):
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        logged(folder, f"logger.wandb.mode={mode}")
    assert offline_lines(folder) == LINES
    assert "W&B is offline; the run goes online with: " in caplog.text


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_with_a_server_that_refuses_the_run_is_offline_and_complete(answer, folder, monkeypatch, caplog):
    server, _, address = serve(failure=answer)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    logged(folder)
    server.shutdown()
    assert offline_lines(folder) == LINES
    assert caplog.text.count("W&B could not start online: ") == 1


def test_a_login_in_a_netrc_file_is_known_to_wandb(folder, tmp_path, monkeypatch, caplog):
    server, handler, address = serve()
    (tmp_path / "netrc").write_text(f"machine {address.removeprefix('http://')}\nlogin user\npassword {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", address)
    with caplog.at_level(logging.INFO):
        logged(folder)
    server.shutdown()
    assert f"W&B is online: {address}/someone/grass/runs/" in caplog.text
    assert [(line["tokens"], line["train/loss"]) for line in handler.lines] == LINES
    assert not [*folder.glob("wandb/offline-run-*")]


def test_a_network_that_goes_away_leaves_what_the_named_command_uploads(folder, monkeypatch, caplog):
    server, handler, address = serve()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    run = WandbLogger(load([f"run.root={folder.parent}"]), folder)
    run.log({"step": 1, "tokens": 100, "train/loss": 4.0})
    handler.failure = (503, b"")
    run.log({"step": 2, "tokens": 200, "train/loss": 3.0})
    began = time.monotonic()
    run.finish({"val/loss": 2.0})
    assert time.monotonic() - began < 30
    command = caplog.text.split("goes online with: ")[1].splitlines()[0]
    handler.failure = None
    handler.lines.clear()
    assert Path(shlex.split(command)[0]).samefile(Path(sys.executable).with_name("wandb"))
    subprocess.run(command, shell=True, check=True, capture_output=True)
    server.shutdown()
    assert [(line["tokens"], line["train/loss"]) for line in handler.lines] == [(100, 4.0), (200, 3.0)]


def test_the_named_command_joins_an_offline_run_and_its_continuation(folder, monkeypatch, caplog):
    parts = [[(100, 4.0), (200, 3.0)], [(300, 2.0)]]
    with caplog.at_level(logging.INFO):
        for part in parts:
            run = WandbLogger(load([f"run.root={folder.parent}", "logger.wandb.mode=offline"]), folder)
            for tokens, loss in part:
                run.log({"tokens": tokens, "train/loss": loss})
                logging.getLogger("pretrain").info("loss %s", loss)
            run.finish({})
            time.sleep(1.1)  # the folders of offline runs are named by the second
    server, handler, address = serve()
    command = caplog.text.split("goes online with: ")[1].splitlines()[0]
    surroundings = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": address}
    subprocess.run(command, shell=True, check=True, capture_output=True, env=surroundings)
    server.shutdown()
    assert [(line["_step"], line["tokens"], line["train/loss"]) for line in handler.lines] == [
        (step, *values) for step, values in enumerate([*parts[0], *parts[1]])
    ]
    assert [line.split()[-1] for line in handler.log if " loss " in line] == ["4.0", "3.0", "2.0"]


def test_a_run_whose_w_and_b_process_is_killed_continues_in_an_offline_one(folder, caplog):
    run = WandbLogger(load([f"run.root={folder.parent}", "logger.wandb.mode=offline"]), folder)
    run.log({"step": 1, "tokens": 100, "train/loss": 4.0})
    listed = subprocess.run(
        ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True
    )
    for line in listed.stdout.splitlines():
        if "wandb-core" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    time.sleep(1.1)  # so that the second run's folder, named by the second, is another one
    run.log({"step": 2, "tokens": 200, "train/loss": 3.0})
    run.finish({"val/loss": 2.0})
    assert caplog.text.count("W&B could not log: ") == 1
    *_, second = sorted(folder.glob("wandb/offline-run-*"))
    found = [items(r.history.item) for r in complete(second) if r.WhichOneof("record_type") == "history"]
    assert [line["tokens"] for line in found] == [200]


def started(folder):
    """The record with which the offline run below ``folder`` starts."""
    (run,) = (r.run for r in complete(folder) if r.WhichOneof("record_type") == "run")
    return run


VARIABLES = {
    "WANDB_PROJECT": ("mine", lambda run: run.project),
    "WANDB_ENTITY": ("us", lambda run: run.entity),
    "WANDB_NAME": ("a name", lambda run: run.display_name),
    "WANDB_RUN_GROUP": ("a group", lambda run: run.run_group),
    "WANDB_JOB_TYPE": ("a job", lambda run: run.job_type),
    "WANDB_RUN_ID": ("myid42", lambda run: run.run_id),
    "WANDB_TAGS": ("one,two", lambda run: ",".join(run.tags)),
    "WANDB_NOTES": ("some notes", lambda run: run.notes),
}


@pytest.mark.parametrize(("name", "value", "read"), [(n, *found) for n, found in VARIABLES.items()], ids=VARIABLES)
def test_wandb_s_own_variables_are_obeyed(name, value, read, folder, monkeypatch):
    monkeypatch.setenv(name, value)
    logged(folder)
    assert read(started(folder)) == value and offline_lines(folder) == LINES


def test_wandb_s_variable_for_its_folder_is_obeyed(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "else where"))
    (tmp_path / "else where").mkdir()
    with caplog.at_level(logging.INFO):
        logged(folder)
    assert offline_lines(tmp_path / "else where") == LINES and not (folder / "wandb").exists()
    assert f"sync '{tmp_path}/else where/wandb'/offline-run-*-" in caplog.text


def test_the_configuration_comes_before_the_variables(folder, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    logged(folder, "logger.wandb.project=ours", "logger.wandb.group=ours")
    run = started(folder)
    assert (run.project, run.run_group) == ("ours", "ours")


MODES = {  # WANDB_MODE, logger.wandb.mode, whether there is an offline run
    "offline": ("offline", "auto", True),
    "its older name": ("dryrun", "auto", True),
    "disabled": ("disabled", "auto", False),
    "configured first": ("disabled", "offline", True),
    "configured off": ("offline", "disabled", False),
    "empty": ("", "auto", True),
}


@pytest.mark.parametrize(("variable", "mode", "kept"), MODES.values(), ids=MODES)
def test_the_mode_that_wandb_s_variable_names_is_taken(variable, mode, kept, folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    if variable:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    logged(folder, f"logger.wandb.mode={mode}")
    assert time.monotonic() - began < 10  # no wait for a network
    assert bool([*folder.glob("wandb/offline-run-*")]) == kept
    assert not [*folder.glob("wandb/run-*")]


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "sometimes"), ("WANDB_BASE_URL", "http://")])
def test_a_value_that_wandb_refuses_is_logged_and_ends_nothing(name, value, folder, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    logged(folder)
    assert "W&B could not start offline: " in caplog.text and repr(value) in caplog.text


def test_a_broken_installation_is_logged_and_ends_nothing(folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logged(folder)
    assert [record.message.split(": ")[0] for record in caplog.records] == [
        "W&B could not start",
        "W&B could not start offline",
    ]
