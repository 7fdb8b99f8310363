"""The commands that a user is told run as they stand, only smaller, and what the README names exists."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import pretrain.train
from models.llama import Llama
from pretrain import estimate
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import CONF, keys, load
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.sweep import combinations, job_name, parse
from pretrain.training.trainer import Outcome, Trainer

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("settings", "tutorial", "inference", "fine_tuning", "runs", "hyperparameters")
README = (ROOT / "README.md").read_text()
SETTINGS, TUTORIAL, INFERENCE, FINE_TUNING, RUNS, HYPERPARAMETERS = (
    (ROOT / f"docs/{name}.md").read_text() for name in NAMES
)
PAGES = [README, SETTINGS, TUTORIAL, INFERENCE, FINE_TUNING, RUNS, HYPERPARAMETERS]


def commands(text: str) -> list[str]:
    """The commands of its bash blocks, without ./test.sh, which is what runs this test."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if not line.startswith("./test.sh")]


def is_of_a_run(command: str) -> bool:
    """Whether it needs what a command before it left in runs/, or leaves what one behind it needs."""
    return bool(re.search(r"\bruns\b|run.name=(mine|sympy)", command))


PLANS = [c for c in dict.fromkeys(commands(README) + commands(RUNS)) if "dry_run" in c or "estimate" in c]
FOLLOWED = [  # in this order
    c for c in dict.fromkeys(commands(README) + commands(INFERENCE) + commands(FINE_TUNING)) if is_of_a_run(c)
]
TRAININGS = [c for c in dict.fromkeys(commands(README) + commands(RUNS)) if c not in PLANS and not is_of_a_run(c)]
CHECKED = [*TRAININGS, *commands(HYPERPARAMETERS)]
SMALLER = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "train.seq_len=32", "train.tokens_per_step=64", "train.steps=2", "train.compile=false",
    "train.eval_sequences=2", "train.sample_tokens=2", "optim.warmup_steps=1", "data.max_bytes=2000000",
    "logger.wandb.mode=disabled",
]  # fmt: skip


def test_no_command_is_left_out():
    told = {command for page in PAGES for command in commands(page)}
    assert told == {*PLANS, *FOLLOWED, *CHECKED, *commands(TUTORIAL)}
    assert min(map(len, (PLANS, FOLLOWED, TRAININGS, commands(TUTORIAL), commands(HYPERPARAMETERS)))) > 0


@pytest.mark.parametrize("shell", [["bash", "-O", "failglob", "-c"], ["zsh", "-f", "-c"]], ids=["bash", "zsh"])
def test_a_shell_leaves_brackets_and_braces_in_the_commands_as_they_are(shell, tmp_path):
    """zsh, and bash with failglob, refuse a word that looks like a pattern; both expand braces."""
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
    pages = [README, *(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    plain = [
        line
        for line in lines
        if re.match(r"(\./launch\.sh|\.venv/bin/python)\b", line) and not set("<>|&;$`") & set(line)
    ]
    assert len(plain) > 30 and any("[" in line for line in plain)
    for line in plain:
        words = shlex.split(line, comments=True)
        line = re.sub(r"\s#.*", "", line)  # zsh takes comments for words in what -c gives
        shown = subprocess.run([*shell, f"printf '%s\\n' {line}"], cwd=tmp_path, capture_output=True, text=True)
        assert (shown.returncode, shown.stdout.splitlines()) == (0, words), f"{line}: {shown.stderr}"


def train(command: str, root: Path, prepared: Path) -> None:
    smaller = [*SMALLER, f"run.root={root}", f"data.root={prepared}"]
    if "optim=adamw" not in command:
        smaller.append("optim.rank=8")
    run([*shlex.split(command), *smaller])


def run(command: list[str]) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    program, *words = command
    command = [program.replace(".venv/bin", str(Path(sys.executable).parent)), *words]  # GRASS_TORCH names another one
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]


def follow(command: str, root: Path, more: list[str]) -> None:
    """Run ``command`` in this process, with ``root`` in place of runs/; a training gets ``more`` overrides."""
    program, *words = [re.sub(r"(^|=)runs\b", rf"\1{root}", word) for word in shlex.split(command)]
    if program.endswith("launch.sh"):
        config = load([*words, *SMALLER, "optim.rank=8", f"run.root={root}", *more])
        alone = World(0, 1, torch.device("cpu"))
        assert Trainer(config, alone, ready(config, 1), RunFolder(config), StopRequest()).fit() is Outcome.FINISHED
    else:
        importlib.import_module(words[1]).main(words[2:])


def test_what_is_done_with_runs_can_be_done_in_the_order_told(tmp_path, tmp_path_factory):
    prepared = [f"data.root={tmp_path_factory.getbasetemp() / 'readme-prepared'}"]
    pairs = [json.dumps({"prompt": f"{a} + {a} =", "response": f" {2 * a}"}) for a in range(40)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(pairs))
    for command in ["./launch.sh", *FOLLOWED]:
        tasks = [f"data.paths=[{tmp_path}/tasks.jsonl]"] if "tasks.jsonl" in command else []
        follow(command, tmp_path, prepared + tasks)
    for file in ("mine-exported/model.safetensors", "exported/config.json", "report/index.html"):
        assert (tmp_path / file).exists(), file
    assert (tmp_path / "continued/hf_assets").is_dir()
    for name in ("continued", "tuned"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("command", PLANS)
def test_plans_are_printed_and_nothing_is_written(command, tmp_path, capsys):
    overrides = [word for word in shlex.split(command) if "=" in word]
    config = load([*overrides, *SMALLER, "optim.rank=8", f"run.root={tmp_path}"])
    (estimate.run if "pretrain.estimate" in command else pretrain.train.run)(config)
    assert re.search("memory of a device|largest micro-batch that fits in 24 GiB", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_the_tutorial_can_be_followed(tmp_path):
    text = [
        f"data.paths=[{ROOT}/optim,{ROOT}/models]",
        "data.validation_share=0.2",
        f"data.root={tmp_path / 'prepared'}",
    ]
    plan, *rest = commands(TUTORIAL)
    assert plan.endswith("train.dry_run=true")
    check(load([word for word in shlex.split(plan) if "=" in word] + text))
    for command in rest:
        follow(command, tmp_path, text if "launch.sh" in command else [])
    assert (tmp_path / "sympy" / "report" / "index.html").exists() and (tmp_path / "exported" / "config.json").exists()


@pytest.mark.parametrize("command", TRAININGS)
def test_the_commands_run(command, tmp_path, tmp_path_factory):
    train(command, tmp_path, tmp_path_factory.getbasetemp() / "readme-prepared")
    (folder,) = (p.parent for p in tmp_path.glob("**/config.yaml"))
    table = RUNS.split("## Run folder")[1].split("##")[0]
    optional = ("wandb/", "tensorboard/", "selection.jsonl", "hf_assets/")
    for name in re.findall(r"^\| `([\w.]+\w/?)` \| ", table, re.M):
        assert (folder / name).exists() or name in optional, name


def test_the_python_block_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    model = Llama(
        vocab_size=16, hidden_size=128, intermediate_size=160, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    model.init_weights(0)
    batches = [torch.randint(0, 16, (2, 8)) for _ in range(3)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exec(
        code,
        {
            "torch": torch, "model": model, "batches": batches, "first_batch": batches[0],
            "loss_of": lambda model, ids: model(ids, ids) / ids.numel(),
        },
    )  # fmt: skip
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("command", CHECKED)
def test_the_commands_pass_the_check_as_they_stand(command):
    overrides = [word for word in shlex.split(command) if "=" in word and not word.startswith("--")]
    for job in combinations(parse(overrides)):
        check(load(job))


def test_the_jobs_of_a_sweep_have_the_names_that_are_told():
    (command,) = {c for page in (README, RUNS) for c in commands(page) if c.startswith("./launch.sh -m ")}
    settings = parse(shlex.split(command)[2:])
    (fixed,) = combinations([o for o in settings if not o.is_sweep_override()])
    names = [job_name([o for o in job if o not in fixed], fixed) for job in combinations(settings)]
    for page in (README, RUNS):
        assert re.findall(r"`runs/sweep/(.+?)/` and so on", page) == names[:1]


def test_the_overrides_people_use_pass_the_check():
    rows = README.split("Common overrides:")[1].split("\n\n")[1]
    overrides = re.findall(r"^\| `([^`]+)` \|", rows, re.M)
    assert len(overrides) >= 10
    for override in overrides:
        check(load(["train.steps=1000", *override.split()]))


def test_the_tables_name_what_there_is():
    for group in ("model", "optim", "data", "logger"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", README, re.M)
        named = re.findall(r"`([\w_]+)`", row)
        assert sorted(named) == sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for folder in re.findall(r"^\| `([\w/.]+/|docs/[\w.]+)` \|", README, re.M):
        if folder not in ("checkpoints/", "wandb/"):
            assert (ROOT / folder).exists(), folder


def test_every_override_that_is_named_is_there():
    known = {
        key for optim in ("grass", "galore", "muon") for key in keys(OmegaConf.structured(load([f"optim={optim}"])))
    }
    groups = "run|train|optim|data|model|logger|estimate|experiment"
    words = {word for page in PAGES for code in re.findall(r"`([^`\n]+)`", page) for word in code.split()}
    words.remove("train.log")  # a file
    named = [
        re.match(rf"((?:{groups})(?:\.[a-z0-9_]+)*)=(.+)|((?:run|train|optim)(?:\.[a-z_]+)+)$", word) for word in words
    ]
    assert sum(map(bool, named)) > 60
    for key, value in ((match[1] or match[3], match[2]) for match in named if match):
        options = {path.stem for path in (CONF / key).glob("*.yaml")}
        assert key in known or value in options, f"{key}={value}"
