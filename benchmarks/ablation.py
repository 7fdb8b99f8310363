"""The study behind the defaults of ``optim=grass``: ``python -m benchmarks.ablation [--jobs 2] [stage …]``.

Runs the sweeps that ablation.yaml lists, through Hydra multirun, below ``runs/ablation``, and writes
``docs/ablation.md`` and ``docs/ablation.png``, of the stages it was told. The same command again resumes what is
unfinished, skips what is finished, and writes both anew.
"""

import argparse
import math
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from pretrain.sweep import JobResult, run_sweep

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"


@dataclass
class Trial:
    """One setting of a stage, and what its seeds came to: final validation losses in nats a token, and tokens/s."""

    setting: str
    by_seed: dict[str, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    commits: set[str] = field(default_factory=set)

    @property
    def loss(self) -> float:
        return statistics.mean(self.by_seed.values())

    @property
    def error(self) -> float:
        return standard_error(list(self.by_seed.values()))

    def minus(self, other: "Trial") -> tuple[float, float]:
        """The mean difference of the losses and its standard error, seed by seed.

        A seed's weights and order of the data move every method alike, and by more than methods differ.
        """
        differences = [loss - other.by_seed[seed] for seed, loss in self.by_seed.items() if seed in other.by_seed]
        return (statistics.mean(differences) if differences else math.nan), standard_error(differences)


def standard_error(values: list[float]) -> float:
    """Of the mean of ``values``; NaN for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def run_stage(stage: dict[str, Any], common: list[str], root: Path, jobs: int) -> dict[str, list[Trial]]:
    """The trials of a stage by topic; a job that fails is named by the sweep and left out here."""
    topics: dict[str, list[Trial]] = {}
    for topic, lines in stage["sweeps"].items():
        trials: dict[str, Trial] = {}
        for line in lines:
            fixed = [*common, *stage.get("common", [])]
            for result in run_sweep([*fixed, *line.split()], root=str(root), jobs=jobs):
                gather(trials, result, fixed)
        topics[topic] = list(trials.values())
    return topics


def gather(trials: dict[str, Trial], result: JobResult, fixed: list[str]) -> None:
    """Add a finished job to the trial of its setting: its overrides without the seed and those that all share."""
    if result.summary is None:
        return
    seeds = [o for o in result.overrides if o.startswith("train.seed=")]
    told = " ".join(o for o in result.overrides if o not in fixed and o not in seeds)
    trial = trials.setdefault(told, Trial(told))
    trial.by_seed[" ".join(seeds)] = result.summary["val/loss"]
    trial.speeds.append(result.summary["tokens_per_s"])
    trial.commits.add(str(result.summary.get("commit")))


def table(topics: dict[str, list[Trial]], against: Trial | None) -> list[str]:
    """Markdown: a line for each trial, and how far it is from the one ``against``, ± standard errors over seeds."""
    lines = []
    for topic, trials in topics.items():
        lines += [
            f"### {topic}",
            "",
            f"| setting | seeds | loss | {f'from `{against.setting}`' if against else ''} | tokens/s |",
            "|---|---|---|---|---|",
        ]
        for t in sorted(trials, key=lambda t: t.loss):
            difference, error = t.minus(against) if against else (math.nan, math.nan)
            beside = (
                "" if math.isnan(difference) else f"{difference:+.4f}{plus_minus(error) if t is not against else ''}"
            )
            speed = f"{statistics.median(t.speeds):,.0f}"
            lines.append(
                f"| `{t.setting}` | {len(t.by_seed)} | {t.loss:.4f}{plus_minus(t.error)} | {beside} | {speed} |"
            )
        lines.append("")
    return lines


def plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.4f}"


def plot(stages: dict[str, dict[str, list[Trial]]], file: Path) -> None:
    """A dot for each trial, a panel for each stage, topics apart by colour; the best dense and GaLore runs as lines."""
    heights = [sum(map(len, topics.values())) for topics in stages.values()]
    figure, axes = plt.subplots(
        len(stages), 1, figsize=(9, 1.2 * len(stages) + 0.21 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, (name, topics) in zip(axes[:, 0], stages.items(), strict=True):
        labels: list[str] = []
        for colour, trials in enumerate(topics.values()):
            for t in sorted(trials, key=lambda t: t.loss):
                axis.errorbar(t.loss, len(labels), xerr=0 if math.isnan(t.error) else t.error, fmt="o", c=f"C{colour}")
                labels.append(t.setting)
        for method, style in (("optim=adamw", "--"), ("optim=galore", ":")):
            losses = [t.loss for trials in topics.values() for t in trials if t.setting.split()[0] == method]
            if losses:
                axis.axvline(min(losses), ls=style, c="0.5", label=f"best of {method}")
        axis.set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
        axis.invert_yaxis()
        axis.set(title=name, xlabel="validation loss, nats a token")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def write(study: dict[str, Any], stages: dict[str, dict[str, list[Trial]]]) -> None:
    """``docs/ablation.md`` and ``docs/ablation.png`` of what is finished."""
    lines = [
        "# The ablation",
        "",
        f"Written by `python -m benchmarks.ablation` on {time.strftime('%Y-%m-%d')} from the runs it made; "
        f"machine: {platform.platform()}, CPU. Losses are of the validation split after the last step, in nats a "
        f"token; ± is the standard error over seeds, of a difference that of the differences seed by seed. "
        f"Shared by all runs: `{' '.join(study['common'])}`. Speeds were taken while other work was running and "
        "are no measurement.",
        "",
        "![every trial's final loss](ablation.png)",
        "",
    ]
    for name, topics in stages.items():
        trials = [t for trials in topics.values() for t in trials]
        against = next((t for t in trials if t.setting == study["stages"][name]["against"]), None)
        common = " ".join(study["stages"][name].get("common", []))
        commits = ", ".join(sorted({c[:7] for t in trials for c in t.commits}))
        lines += [
            f"## {name}",
            "",
            study["stages"][name]["about"],
            "",
            f"Settings: `{common}`. Commits: {commits}.",
            "",
        ]
        lines += table(topics, against)
    (DOCS / "ablation.md").write_text("\n".join(lines), encoding="utf-8")
    plot(stages, DOCS / "ablation.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study = yaml.safe_load((HERE / "ablation.yaml").read_text())
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(study['stages'])}; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--root", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(study["stages"]):
        parser.error(f"{', '.join(unknown)}: no stage of benchmarks/ablation.yaml")
    stages = {
        name: run_stage(stage, study["common"], arguments.root / name, arguments.jobs)
        for name, stage in study["stages"].items()
        if name in (arguments.stages or study["stages"])
    }
    write(study, stages)


if __name__ == "__main__":
    main()
