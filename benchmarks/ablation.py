"""Study of the defaults of ``optim=grass``: ``python -m benchmarks.ablation [--jobs 2] [stage …]``.

Runs the sweeps that ablation.yaml lists, through Hydra multirun, in ``runs/ablation``. Each result is added to
``docs/ablation.jsonl``, one line (record) per run. Runs in that file are not repeated, on any machine, and unfinished
runs are resumed. ``docs/ablation.md`` and ``docs/ablation.png`` are written from the file; with ``--written``, nothing
is run.

A record holds for the defaults of its commit. After a change of a default, remove the affected records from the file,
or their sweeps from ablation.yaml.
"""

import argparse
import json
import math
import shlex
import statistics
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes

from benchmarks.frontier import plot_frontier
from pretrain.runs.figures import GREY, new_figure, save
from pretrain.runs.sweep_results import JobResult
from pretrain.sweep import combinations, parse, run_sweep

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
RECORDS = DOCS / "ablation.jsonl"
SEED = "train.seed="
LABEL_WIDTH = 34  # characters per line

# A line of the file is a run: stage, setting, seed, loss, tokens_per_s, commit, machine, date. Or it is a trial whose
# single runs are lost: seeds instead of seed, error, commits, and minus: {setting: [difference, its error]}.
Record = dict[str, Any]


@dataclass
class Trial:
    """A setting of a stage and its results.

    Attributes:
        setting: the overrides of a job without the seed and without those that all jobs share, see ``split``.
        by_seed: for each seed, the final validation loss in nats per token.
        commits: the commits of the runs.
        summed: the record of the means over the seeds, if the records of the single runs are lost; else None.
    """

    setting: str
    by_seed: dict[str, float] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)
    summed: Record | None = None

    @property
    def seeds(self) -> list[str]:
        return self.summed["seeds"] if self.summed else list(self.by_seed)

    @property
    def loss(self) -> float:
        return self.summed["loss"] if self.summed else statistics.mean(self.by_seed.values())

    @property
    def error(self) -> float:
        return self.summed["error"] if self.summed else standard_error(list(self.by_seed.values()))

    def minus(self, other: "Trial") -> tuple[float, float]:
        """Return the mean over common seeds of this loss minus ``other``'s, and its standard error; NaN if unknown.

        Losses are paired by seed, because two seeds of a method (initial weights, order of the data) differ by more
        than two methods.
        """
        if other is self:
            return 0.0, 0.0
        if self.summed:
            difference, error = self.summed["minus"].get(other.setting, (math.nan, math.nan))
            return difference, error
        differences = [loss - other.by_seed[seed] for seed, loss in self.by_seed.items() if seed in other.by_seed]
        return (statistics.mean(differences) if differences else math.nan), standard_error(differences)


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of ``values``, or NaN for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def split(overrides: Iterable[str], fixed: Sequence[str]) -> tuple[str, str]:
    """Return the setting and the seed of a job.

    The setting is the job's overrides without the seed and without ``fixed``, which all jobs share. The seed is "0" if
    no override sets it.
    """
    told = [o for o in overrides if o not in fixed]
    seeds = [o.removeprefix(SEED) for o in told if o.startswith(SEED)]
    return " ".join(o for o in told if not o.startswith(SEED)), seeds[0] if seeds else "0"


def recorded(file: Path) -> list[Record]:
    """Return the records of a file, or an empty list if it is missing."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def record_of(stage: str, result: JobResult, fixed: Sequence[str]) -> Record | None:
    """Return the record of a finished job, or None for a failed job, which the sweep reports."""
    if (summary := result.summary) is None:
        return None
    setting, seed = split(result.overrides, fixed)
    told = {name: summary.get(name) for name in ("commit", "machine")}
    numbers = {"loss": round(summary["val/loss"], 6), "tokens_per_s": round(summary["tokens_per_s"])}
    return {"stage": stage, "setting": setting, "seed": seed, **numbers, **told, "date": time.strftime("%Y-%m-%d")}


def run_missing(
    name: str, stage: dict[str, Any], common: list[str], root: Path, jobs: int, records: Path | None = None
) -> None:
    """Run the jobs of a stage that have no record yet, and add their records to the file after each sweep.

    Args:
        name: the name of the stage in the study.
        stage: the stage's entry in the study's YAML file.
        common: the overrides of all stages.
        root: the folder of the runs.
        jobs: the number of runs at the same time.
        records: the file of the records; None: docs/ablation.jsonl.
    """
    records = records or RECORDS
    fixed = [*common, *stage.get("common", [])]
    for line in (line for lines in stage["sweeps"].values() for line in lines):
        known = {
            (record["setting"], seed)
            for record in recorded(records)
            if record["stage"] == name
            for seed in record.get("seeds", [record.get("seed")])
        }
        missing = [o for o in combinations(parse([*fixed, *line.split()])) if split(o, fixed) not in known]
        if not missing:
            continue
        # The smallest sweep that contains all missing jobs.
        alternatives = [list(dict.fromkeys(column)) for column in zip(*missing, strict=True)]
        sweep = [",".join([first, *(o.partition("=")[2] for o in more)]) for first, *more in alternatives]
        with records.open("a") as file:
            for result in run_sweep(sweep, root=str(root / name), jobs=jobs):
                record = record_of(name, result, fixed)
                if record and (record["setting"], record["seed"]) not in known:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def trials_of(name: str, stage: dict[str, Any], common: list[str], records: list[Record]) -> dict[str, list[Trial]]:
    """Return the recorded trials of the stage's sweeps by topic, the heading of the sweeps in the YAML file."""
    fixed = [*common, *stage.get("common", [])]
    topics: dict[str, list[Trial]] = {}
    for topic, lines in stage["sweeps"].items():
        jobs = [o for line in lines for o in combinations(parse([*fixed, *line.split()]))]
        settings = dict.fromkeys(split(o, fixed)[0] for o in jobs)
        ours = [record for record in records if record["stage"] == name]
        trials = [trial_of(setting, [r for r in ours if r["setting"] == setting]) for setting in settings]
        topics[topic] = [trial for trial in trials if trial.seeds]
    return {topic: trials for topic, trials in topics.items() if trials}


def trial_of(setting: str, records: list[Record]) -> Trial:
    """Return the trial of ``setting`` from its records.

    A summed record (of the means over seeds) is used only if single runs of some of its seeds have no record.
    """
    runs = [record for record in records if "seed" in record]
    summed = next((record for record in records if "seeds" in record), None)
    if summed and not {*summed["seeds"]} <= {run["seed"] for run in runs}:
        return Trial(setting, {}, {*summed["commits"]}, summed)
    return Trial(setting, {run["seed"]: run["loss"] for run in runs}, {str(run["commit"]) for run in runs})


def in_a_shell(overrides: Iterable[str]) -> str:
    """Return ``overrides`` as typed in a shell, quoted if they have brackets, braces or stars."""
    return " ".join(map(shlex.quote, overrides))


def table(topics: dict[str, list[Trial]], against: Trial | None) -> list[str]:
    """Return a Markdown heading and table for each topic.

    A table has a row for each trial, with its difference from ``against`` (None: no differences) and the standard error
    over seeds.
    """
    paragraphs = []
    relative = f"relative to `{in_a_shell(against.setting.split())}`" if against else ""
    for topic, trials in topics.items():
        lines = [f"| setting | seeds | loss | {relative} |", "|---|---|---|---|"]
        for t in sorted(trials, key=lambda t: t.loss):
            difference, error = t.minus(against) if against else (math.nan, math.nan)
            beside = (
                "" if math.isnan(difference) else f"{difference:+.4f}{plus_minus(error) if t is not against else ''}"
            )
            setting, loss = in_a_shell(t.setting.split()), f"{t.loss:.4f}{plus_minus(t.error)}"
            lines.append(f"| `{setting}` | {len(t.seeds)} | {loss} | {beside} |")
        paragraphs += [f"### {topic}", "\n".join(lines)]
    return paragraphs


def plus_minus(error: float) -> str:
    """Return " ± " and the standard error ``error``, or "" if it is NaN."""
    return "" if math.isnan(error) else f" ± {error:.4f}"


def plot(stages: dict[str, dict[str, list[Trial]]], file: Path) -> None:
    """Draw a panel for each stage, with a line for each trial and its loss (nats per token) on the x-axis.

    A colour stands for a topic: a table of the page. Vertical lines mark the best AdamW and GaLore runs.

    Args:
        stages: by the title of each stage, its trials by topic.
        file: the picture to write.
    """
    heights = [0.26 + sum(map(len, topics.values())) * row_height(topics) for topics in stages.values()]  # inches
    with new_figure(height=0.6 * len(stages) + sum(heights), grid="x") as figure:
        axes = figure.subplots(len(stages), 1, height_ratios=heights, squeeze=False)
        for axis, (title, topics) in zip(axes[:, 0], stages.items(), strict=True):
            plot_stage(axis, topics)
            axis.set_title(title)
        axes[-1, 0].set_xlabel("validation loss, nats per token")
        named = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes[:, 0]]
        lines = {label: line for pairs in named for line, label in pairs}
        if lines:
            figure.legend(lines.values(), lines, loc="outside upper center", ncols=2)
        save(figure, file)


def tick_label(trial: Trial) -> str:
    """Return the setting of ``trial``, shortened and wrapped."""
    setting = trial.setting.removeprefix("optim=grass ").replace("optim.", "").replace(",", ", ")
    return "\n".join(textwrap.wrap(setting, LABEL_WIDTH)).replace(", ", ",")


def row_height(topics: dict[str, list[Trial]]) -> float:
    """Return the height in inches of a row of a stage's panel, enough for its longest label."""
    return max(0.26, *(0.05 + 0.12 * (1 + tick_label(t).count("\n")) for trials in topics.values() for t in trials))


def plot_losses(trials: list[Trial], listing: dict[str, Any], file: Path) -> None:
    """Draw the final losses of some settings, with standard errors over seeds if there are several.

    Args:
        listing: "title", and "names": the name of each setting in the plot.
    """
    names = listing["names"]
    found = sorted((t for t in trials if t.setting in names), key=lambda t: t.loss)
    with new_figure(height=0.9 + 0.32 * len(found), grid="x") as figure:
        axis = figure.add_subplot()
        for place, t in enumerate(found):
            error = 0.0 if math.isnan(t.error) else t.error
            axis.errorbar(t.loss, place, xerr=error, fmt="o", capsize=3, markersize=6)
            axis.annotate(f"{t.loss:.3f}", (t.loss, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axis.set_yticks(range(len(found)), [names[t.setting] for t in found], fontsize=9)
        axis.set_ylim(len(found) - 0.5, -0.7)
        axis.set_title(listing["title"])
        axis.set_xlabel("nats per token; less is better")
        save(figure, file)


def plot_stage(axis: Axes, topics: dict[str, list[Trial]]) -> None:
    """Draw the panel of one stage: a line for each trial, and a colour for each topic."""
    labels: list[str] = []
    for colour, trials in enumerate(topics.values()):
        for t in sorted(trials, key=lambda t: t.loss):
            axis.errorbar(t.loss, len(labels), xerr=0 if math.isnan(t.error) else t.error, fmt="o", c=f"C{colour}")
            labels.append(tick_label(t))
    for method, style in (("optim=adamw", "--"), ("optim=galore", ":")):
        losses = [t.loss for trials in topics.values() for t in trials if t.setting.split()[0] == method]
        if losses:
            axis.axvline(min(losses), ls=style, c=GREY, label=f"best of {method}")
    axis.set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
    axis.set_ylim(len(labels) - 0.5, -0.5)


def write(study: dict[str, Any], records: list[Record], page: str = "ablation") -> None:
    """Write ``docs/<page>.md`` and its plots from the records. ``study`` is the content of ``<page>.yaml``."""
    every = {name: trials_of(name, stage, study["common"], records) for name, stage in study["stages"].items()}
    stages = {name: topics for name, topics in every.items() if topics}
    dates, machines = (sorted({record[what] for record in records}) for what in ("date", "machine"))
    paragraphs = [
        f"# {study['title']}",
        f"{study['about'].strip()} Losses are of the validation split after the last step, in nats per token. ± is the "
        "standard error over seeds. A difference is the mean over the seeds that both settings have, so it can differ "
        "from the difference of the losses shown.",
        f"![Final loss of every trial]({page}.png)",
        "The picture has a colour for each table below. In its labels, settings without `optim=` are those of "
        "`optim=grass`.",
        f"`python -m benchmarks.{page}` wrote this page from its runs, which are recorded in `docs/{page}.jsonl`: "
        f"{', '.join(dates)}; {', '.join(machines)}, CPU. Shared by all runs: `{in_a_shell(study['common'])}`.",
    ]
    for name, topics in stages.items():
        stage, trials = study["stages"][name], [t for trials in topics.values() for t in trials]
        against = next((t for t in trials if t.setting == stage["against"]), None)
        commits = ", ".join(sorted({c[:7] for t in trials for c in t.commits}))
        settings = f"Settings: `{in_a_shell(stage.get('common', []))}`. Commits: {commits}."
        paragraphs += [f"## Stage: {name}", stage["about"], settings, *table(topics, against)]
    (DOCS / f"{page}.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    plot({study["stages"][name]["title"]: topics for name, topics in stages.items()}, DOCS / f"{page}.png")
    if (listing := study.get("losses")) and (shown := stages.get(listing["stage"])):
        plot_losses([t for trials in shown.values() for t in trials], listing, DOCS / "losses.png")
    if (listing := study.get("frontier")) and (shown := stages.get(listing["stage"])):
        of_seed = {t.setting: t.by_seed["0"] for trials in shown.values() for t in trials if "0" in t.by_seed}
        plot_frontier(of_seed, listing, DOCS / "frontier.png")


def main(page: str = "ablation", about: str | None = __doc__) -> None:
    """Run the study of ``<page>.yaml`` as a command. ``about`` is the description in --help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    study = yaml.safe_load((HERE / f"{page}.yaml").read_text())
    file = DOCS / f"{page}.jsonl"
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"from {', '.join(study['stages'])} (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default %(default)s)")
    parser.add_argument("--root", type=Path, default=Path("runs") / page, help="folder of the runs (%(default)s)")
    parser.add_argument(
        "--written", type=Path, nargs="?", const=file, metavar="JSONL",
        help=f"only write the page from these records (docs/{file.name} if none is named)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(study["stages"]):
        parser.error(f"{', '.join(unknown)}: no stage of benchmarks/{page}.yaml")
    if arguments.written and not arguments.written.exists():
        parser.error(f"argument --written: there is no file {arguments.written}")
    for name, stage in study["stages"].items() if not arguments.written else ():
        if name in (arguments.stages or study["stages"]):
            run_missing(name, stage, study["common"], arguments.root, arguments.jobs, file)
    if records := recorded(arguments.written or file):
        write(study, records, page)


if __name__ == "__main__":
    main()
