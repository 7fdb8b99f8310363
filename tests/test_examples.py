"""The scripts in examples/ run, resume exactly in the middle, and leave models that transformers reads."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import hf_trainer, plain_loop

EXAMPLES = Path(plain_loop.__file__).parent
IDS = torch.arange(48)[None]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.name)
def test_it_runs_from_any_folder_with_the_line_that_makes_the_checkout_importable(script, tmp_path):
    assert "sys.path.insert(0, str(CHECKOUT))" in script.read_text()
    command = [sys.executable, str(script), "--out", "made", "--steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    reads_back(tmp_path / "made" / "model")


@torch.no_grad()
def reads_back(folder):
    """The logits of the model in the folder, which has no weight too few or too many."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model(IDS).logits


def test_the_plain_loop_resumes_in_the_middle(tmp_path, capsys):
    losses = plain_loop.train(tmp_path / "all", 30, save_every=17)
    first = plain_loop.train(tmp_path / "parts", 17, save_every=17)
    rest = plain_loop.train(tmp_path / "parts", 30, save_every=17)
    assert "resumed after 17 steps" in capsys.readouterr().out
    assert len(first) == 17 and first + rest == losses
    assert sum(losses[-5:]) < sum(losses[:5]) - 5
    assert torch.equal(reads_back(tmp_path / "parts" / "model"), reads_back(tmp_path / "all" / "model"))


def test_the_trainer_resumes_in_the_middle(tmp_path):
    losses, grass = hf_trainer.train(tmp_path / "all", 30, 17, resume=False)
    assert grass.steps == 30 and len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5]) - 5
    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "all" / "checkpoint-17", tmp_path / "parts" / "checkpoint-17")
    again, resumed = hf_trainer.train(tmp_path / "parts", 30, 17, resume=True)
    assert resumed.steps == 30 and again == losses  # the log of the first 17 is in the checkpoint
    stored = torch.load(tmp_path / "parts" / "checkpoint-30" / "grass.pt", weights_only=True)
    assert stored["steps"] == 30
    assert torch.equal(reads_back(tmp_path / "parts" / "model"), reads_back(tmp_path / "all" / "model"))
    for name, layer in grass.layers.items():
        assert layer.index.tolist() == resumed.layers[name].index.tolist()


@pytest.mark.parametrize("page", ["README.md", "docs/own_loop.md"])
def test_the_loop_in_the_documentation_runs(page, monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / page).read_text(), re.S)
    code = "".join(block for block in blocks if "grass" in block or "restore_linears" in block)
    assert "grass.start(" in code and "sys.path.insert(" in code
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, text = plain_loop.new_model(), plain_loop.text_bytes()
    names = {"torch": torch, "sys": sys, "model": model, "first_batch": 0, "batches": range(12)}
    names["loss_of"] = lambda model, batch: plain_loop.loss_of(model, text, batch)
    exec(code.replace("rank=128", "rank=16"), names)
    assert names["grass"].steps == 12
    if "save_pretrained" in code:
        reads_back(tmp_path / "model")
