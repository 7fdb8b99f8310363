"""The records in a run's folder, read for reports; the run may still be writing them."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from data.atomic import sha256
from pretrain.checkpoint.directory import latest, read_state
from pretrain.config.compose import flat
from pretrain.runs.json_lines import read_json_lines

Series = NDArray[np.float64]
HOW_TO_READ = {"root", "workers", "on_the_fly", "shuffle_block", "prompts"}  # data settings that do not change the text
SEED = re.compile(r"[_-]?seed[-_=]?\d+")


@dataclass(frozen=True)
class RunRecords:
    """The records of the run in the folder ``path``. Each file is read when it is first needed.

    settings   config.yaml
    lines      lines of metrics.jsonl, with a further key ``minutes``: the time in training steps so far
    selection  lines of selection.jsonl
    summary    summary.json; empty until the run is finished
    """

    path: Path
    name: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))  # type: ignore[return-value]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        minutes, before, lines = 0.0, 0, list(read_json_lines(self.path / "metrics.jsonl"))
        for line in lines:
            if "perf/step_s" in line:
                minutes, before = minutes + line["perf/step_s"] * (line["step"] - before) / 60, line["step"]
            line["minutes"] = minutes
        return lines

    @cached_property
    def selection(self) -> list[dict[str, Any]]:
        return list(read_json_lines(self.path / "selection.jsonl"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @cached_property
    def flat_settings(self) -> dict[str, Any]:
        """``settings`` by dotted name: ``{"train.steps": 700, …}``."""
        return flat(OmegaConf.create(self.settings))

    @cached_property
    def fingerprint(self) -> str | None:
        """A hash of the run's tokens, document names and tokenizer, from its newest checkpoint; None without one."""
        newest = latest(self.path / "checkpoints")
        try:
            return read_state(newest)["data"].get("fingerprint") if newest else None
        except (OSError, ValueError):  # being written or deleted
            return None

    @cached_property
    def data_settings(self) -> str:
        """The settings that determine the training text, and the tokenizer's hash, as one string."""
        chosen = {key: value for key, value in self.settings["data"].items() if key not in HOW_TO_READ}
        tokenizers = [sha256(file) for file in sorted(self.path.glob("tokenizer.*"))]
        return json.dumps([chosen, self.settings["model"]["vocab_size"], tokenizers], sort_keys=True)

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def progress(self) -> str:
        """The step as text: ``700`` if the run is finished, otherwise ``300 of 700``."""
        return f"{self.step}" if self.summary else f"{self.step} of {self.settings['train']['steps']}"

    def series(self, key: str, over: str = "tokens") -> tuple[Series, Series]:
        """The logged values of the metric ``key``: x and y, (n,) each.

        Args:
            over: the values of x: "tokens", "minutes" or "step".
        """
        points = [(line[over], line[key]) for line in self.lines if line.get(key) is not None]
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
        return x, y

    def coverage(self) -> tuple[list[str], Series, Series]:
        """How many of each layer's rows have ever been selected, at the t lines of selection.jsonl.

        Returns:
            The names of the layers, the tokens trained on (t,), and the shares of rows (layers, t).
        """
        layers = list(dict.fromkeys(name for line in self.selection for name in line["layers"]))
        shares = np.full((len(layers), len(self.selection)), np.nan)
        for t, line in enumerate(self.selection):
            shares[:, t] = shares[:, t - 1] if t else 0.0
            for name, layer in line["layers"].items():
                shares[layers.index(name), t] = layer["ever_selected"] / layer["rows"]
        steps = np.array([line["step"] for line in self.selection], dtype=float)
        return layers, steps * self.settings["train"]["tokens_per_step"], shares


def find_runs(paths: list[Path]) -> list[RunRecords]:
    """The runs at ``paths``: folders of runs, or folders that contain runs.

    Each run is named by the last parts of its path: one part if this distinguishes all runs, otherwise more.

    Raises:
        ValueError: a path contains no run that has logged anything.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        inside = [path] if (path / "config.yaml").exists() else sorted(p.parent for p in path.rglob("config.yaml"))
        logged = [p for p in inside if (p / "metrics.jsonl").exists() and (p / "metrics.jsonl").stat().st_size]
        if not logged:
            raise ValueError(f"{path} contains no run that has logged anything; give a folder below run.root")
        folders |= dict.fromkeys(logged)
    parts = 1
    while len({p.parts[-parts:] for p in folders}) < len(folders):
        parts += 1
    return [RunRecords(p, "/".join(p.parts[-parts:])) for p in folders]


def group_by_data(runs: list[RunRecords]) -> list[list[RunRecords]]:
    """Divide ``runs`` into sets with comparable losses: the same data, sequence length, validation and document masks.

    A run without a checkpoint has no fingerprint of its data yet. It joins the runs that have the same data settings,
    if all of these runs have the same fingerprint.
    """
    known: dict[str, set[str]] = {}
    for run in runs:
        if run.fingerprint:
            known.setdefault(run.data_settings, set()).add(run.fingerprint)
    sets: dict[tuple, list[RunRecords]] = {}
    for run in runs:
        train, others = run.settings["train"], known.get(run.data_settings, set())
        data = run.fingerprint or (next(iter(others)) if len(others) == 1 else run.data_settings)
        key = (data, train["seq_len"], train["eval_sequences"], train["document_masks"])
        sets.setdefault(key, []).append(run)
    return list(sets.values())


def group_by_seed(runs: list[RunRecords]) -> dict[str, list[RunRecords]]:
    """Group runs that differ only in ``train.seed``, ``run`` and ``logger`` settings, by a common name."""
    groups: dict[str, dict[int, RunRecords]] = {}
    for run in runs:
        settings = {k: v for k, v in run.settings.items() if k not in ("run", "logger")}
        settings["train"] = {k: v for k, v in run.settings["train"].items() if k != "seed"}
        key, seed = json.dumps(settings, sort_keys=True), run.settings["train"]["seed"]
        if seed in groups.get(key, {}):  # the same run twice, under two names
            key += run.name
        groups.setdefault(key, {})[seed] = run
    named: dict[str, list[RunRecords]] = {}
    for group in groups.values():
        first, *others = group.values()
        name = f"{SEED.sub('', first.name).strip('_-')} ({len(group)} seeds)" if others else first.name
        named[name if name not in named else first.name] = [first, *others]
    return named
