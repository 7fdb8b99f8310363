"""The scaling benchmark on the tiniest shape: what crosses the wire is what the code counts."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.scaling import step_times
from benchmarks.steps import Step, configuration, summarise
from models.grass_linear import GrassLinear
from pretrain.setup.model import outline

COMMAND = [sys.executable, "-m", "benchmarks.scaling", "--size", "nano", "--rank", "64", "--json"]


def rows_of(root, *arguments):
    done = subprocess.run([*COMMAND, *arguments], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="makes network namespaces, as root")
def test_the_bytes_on_the_wire_are_those_counted(root):
    found, _ = rows_of(root, "--methods", "adamw,galore,grass,grass+head", "--mbit", "2000", "--steps", "4")
    adamw, galore, grass, headed = found["rows"]
    for row in found["rows"]:
        assert row["interface_bytes"] == pytest.approx(row["counted_bytes"], rel=0.05)
    assert galore["bytes_per_step"] == adamw["bytes_per_step"]
    assert headed["bytes_per_step"] < grass["bytes_per_step"] < adamw["bytes_per_step"]


def test_without_the_right_to_make_hosts_it_says_so_and_uses_the_loopback(root, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no `ip`, no `tc`
    found, said = rows_of(root, "--methods", "grass", "--steps", "1")
    assert found["link"] == "loopback" and "on the loopback interface" in said
    (row,) = found["rows"]
    assert row["method"] == "grass" and row["step_s"] > 0
    assert row["tokens_per_s"] == pytest.approx(2 * 256 / row["step_s"])


def test_a_refresh_counts_once_in_its_interval():
    first = Step(3.5, 0.5, 2.25, True)
    regular = [Step(1.0, 0.25, 0.25, False), Step(1.2, 0.5, 0.5, False), Step(9, 8, 1, False)]
    assert step_times(first, regular, 10) == {"regular_s": 1.2, "refresh_s": 1.75, "step_s": 1.2 + 1.75 / 10}
    assert step_times(first, regular, 1) == {"regular_s": 1.2, "refresh_s": 0.0, "step_s": 1.2}
    timing = summarise([*regular, Step(3.0, 0.25, 2.25, True)], refresh_every=10)
    assert timing == pytest.approx({
        "forward_s": 0.5, "backward_s": 0.2, "optimizer_s": 0.5, "refresh_s": 3.0 - 1.2, "refresh_every": 10,
        "step_s": 1.2 + 1.8 / 10, "spread": (5.1 - 1.1) / 1.2,
    })  # fmt: skip
    assert summarise(regular, refresh_every=1)["step_s"] == 1.2
    assert summarise(regular[:1], refresh_every=1)["spread"] == 0


def test_a_layer_under_grass_sends_the_rank_s_share_of_its_full_gradient():
    config, _ = configuration("grass", 64, ["model=llama_nano"])
    layers = [m for m in outline(config).modules() if isinstance(m, GrassLinear)]
    assert len(layers) == 7 * config.model.num_hidden_layers
    for layer in layers:
        sent = [p.numel() for p in layer.parameters() if p.requires_grad]
        assert sent == [layer.weight.numel() * 64 // min(layer.weight.shape)]
