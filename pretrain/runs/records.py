"""What a run's folder tells of it: read for reports, also while the run is still writing."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from pretrain.runs.json_lines import read_json_lines

Series = NDArray[np.float64]
SEED = re.compile(r"[_-]?seed[-_=]?\d+")


@dataclass(frozen=True)
class RunRecords:
    """A run by its folder; everything is read when first asked for.

    lines      of metrics.jsonl, those of training with ``minutes``: the training time so far, validation left out
    selection  of selection.jsonl
    summary    of summary.json; empty until the run is finished
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

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def progress(self) -> str:
        """How far it is: ``700`` when finished, else ``300 of 700``; nobody asks whether it is at work."""
        return f"{self.step}" if self.summary else f"{self.step} of {self.settings['train']['steps']}"

    def series(self, key: str, over: str = "tokens") -> tuple[Series, Series]:
        """(x, y) of the lines that hold ``key``, against ``tokens``, ``minutes`` or ``step``."""
        points = [(line[over], line[key]) for line in self.lines if line.get(key) is not None]
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
        return x, y

    def coverage(self) -> tuple[list[str], Series, Series]:
        """Layers, tokens of each line of selection.jsonl (t,), and the share of rows ever selected (layers, t)."""
        layers = list(dict.fromkeys(name for line in self.selection for name in line["layers"]))
        shares = np.full((len(layers), len(self.selection)), np.nan)
        for t, line in enumerate(self.selection):
            shares[:, t] = shares[:, t - 1] if t else 0.0
            for name, layer in line["layers"].items():
                shares[layers.index(name), t] = layer["ever_selected"] / layer["rows"]
        steps = np.array([line["step"] for line in self.selection], dtype=float)
        return layers, steps * self.settings["train"]["tokens_per_step"], shares


def find_runs(paths: list[Path]) -> list[RunRecords]:
    """The runs at ``paths``, each a run's folder or one that holds some, by the shortest names that differ.

    Raises:
        ValueError: a path holds no run that has logged something.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        inside = [path] if (path / "config.yaml").exists() else sorted(p.parent for p in path.rglob("config.yaml"))
        logged = [p for p in inside if (p / "metrics.jsonl").exists() and (p / "metrics.jsonl").stat().st_size]
        if not logged:
            raise ValueError(f"{path} holds no run that has logged anything; give a folder below run.root")
        folders |= dict.fromkeys(logged)
    parts = 1
    while len({p.parts[-parts:] for p in folders}) < len(folders):
        parts += 1
    return [RunRecords(p, "/".join(p.parts[-parts:])) for p in folders]


def by_seed(runs: list[RunRecords]) -> dict[str, list[RunRecords]]:
    """Runs that differ in ``train.seed`` and in nothing else together, under the name that they share."""
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
