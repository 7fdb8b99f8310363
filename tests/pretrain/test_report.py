"""Reports: what a page shows of real runs, finished and going on, and that it needs nothing else to be looked at."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.distributed.world import World
from pretrain.report import main
from pretrain.runs.figures import smooth
from pretrain.runs.folder import RunFolder
from pretrain.runs.records import find_runs, group_by_seed
from pretrain.runs.report_page import write_report
from pretrain.runs.sweep_results import JobResult
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer

TINY = [
    "data=text", "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "optim.warmup_steps=2", "train.steps=8",
    "train.tokens_per_step=256", "train.seq_len=32", "train.eval_sequences=4", "train.log_every=1",
    "train.eval_every=4", "train.compile=false", "train.sample_tokens=4", "logger.wandb.mode=disabled",
]  # fmt: skip
RUNS = {
    "grass_seed-0": ["optim.rank=8", "optim.refresh_every=2"],
    "grass_seed-1": ["optim.rank=8", "optim.refresh_every=2", "train.seed=1"],
    "<adamw>": ["optim=adamw"],
}
PICTURES = [
    "loss-tokens",
    "loss-time",
    "validation-tokens",
    "validation-time",
    "captured",
    "covered",
    "speed",
    "memory",
]


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory) -> Path:
    """A folder with three finished runs, two of which differ in their seed only."""
    folder = tmp_path_factory.mktemp("runs")
    data = [f"data.paths=[{root / 'models'}]", f"data.root={folder / 'prepared'}", "data.validation_share=0.2"]
    for name, overrides in RUNS.items():
        config = load([*TINY, *data, *overrides, f"run.root={folder}", f"run.name={name.strip('<>')}"])
        run = RunFolder(config)
        with run.locked():
            Trainer(config, World(0, 1, torch.device("cpu")), ready(config, 1), run, StopRequest()).fit()
    (folder / "adamw").rename(folder / "<adamw>")  # a name that HTML could take for its own
    return folder


class Page(HTMLParser):
    """Collects the text of a page and what it refers to; fails on tags that are not closed in order."""

    def __init__(self, page: Path):
        super().__init__()
        self.open: list[str] = []
        self.text, self.references = "", []
        self.feed(page.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_every_picture_at_two_widths_and_needs_no_other_file(runs, tmp_path):
    page = Page(write_report([runs], tmp_path))
    names = [*PICTURES, "coverage-grass_seed-0", "coverage-grass_seed-1"]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == sorted(n + w for n in names for w in ("", "-narrow"))
    assert len(page.references) == 1 + 2 * len(names) and all(r.startswith("data:") for r in page.references)
    for name in names:
        wide, narrow = (Image.open(tmp_path / f"{name}{w}.png") for w in ("", "-narrow"))
        assert wide.width > 2 * narrow.width and len(wide.getcolors(1 << 24)) > 20
    for name in RUNS:
        summary = json.loads((runs / name / "summary.json").read_text())
        assert name in page.text and f"{summary['val/loss']:.4f}" in page.text
    assert "Samples of grass_seed-0" in page.text and "refresh_every: 2" in page.text


def test_runs_that_differ_in_their_seed_alone_are_one_curve(runs):
    groups = group_by_seed(find_runs([runs]))
    assert {name: len(group) for name, group in groups.items()} == {"<adamw>": 1, "grass (2 seeds)": 2}
    twice = group_by_seed(find_runs([runs / "grass_seed-0"]) * 2)
    assert [len(group) for group in twice.values()] == [1]


def test_a_run_that_is_still_writing_is_shown_as_far_as_it_is(runs, tmp_path):
    going = tmp_path / "going"
    shutil.copytree(runs / "grass_seed-0", going)
    (going / "summary.json").unlink()
    lines = (going / "metrics.jsonl").read_text().splitlines(keepends=True)
    keep = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 6)
    (going / "metrics.jsonl").write_text("".join(lines[:keep]) + lines[keep][:20])
    text = Page(write_report([going], going / "report")).text
    assert "5 of 8" in text
    (run,) = find_runs([going])
    steps, losses = run.series("train/loss", over="step")
    assert steps.tolist() == [1, 2, 3, 4, 5] and np.isfinite(losses).all()


def test_a_run_with_nothing_but_its_first_line_is_shown(runs, tmp_path):
    shutil.copytree(runs / "grass_seed-0", tmp_path / "new")
    for file in ("summary.json", "selection.jsonl", "samples.md"):
        (tmp_path / "new" / file).unlink()
    first = (tmp_path / "new/metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "new/metrics.jsonl").write_text(first + "\n")
    assert "0 of 8" in Page(write_report([tmp_path / "new"], tmp_path / "report")).text


def test_the_coverage_picture_shows_what_the_metrics_say(runs):
    run = next(run for run in find_runs([runs]) if run.name == "grass_seed-1")
    layers, tokens, shares = run.coverage()
    metric_tokens, metric = run.series("grass/coverage")
    assert len(layers) == 14 and shares.shape == (14, len(tokens))
    for column, at in zip(shares.T, tokens, strict=True):
        assert column.mean() == pytest.approx(metric[metric_tokens == at].item(), abs=1e-12)


def test_times_add_up_to_the_training_time_of_the_summary(runs):
    for run in find_runs([runs]):
        minutes, _ = run.series("train/loss", over="minutes")
        assert minutes[-1] * 60 == pytest.approx(run.summary["training_seconds"], rel=1e-6)


def test_the_moving_average_is_the_weighted_mean_of_what_came_before():
    values = np.random.default_rng(0).normal(size=50)
    keep = 2 / 3  # a memory of two points, a twenty-fifth of them
    for i, average in enumerate(smooth(values)):
        assert average == pytest.approx(np.average(values[: i + 1], weights=keep ** np.arange(i, -1, -1)), rel=1e-12)


def test_the_failed_jobs_of_a_sweep_are_named(runs, tmp_path):
    sweep = tmp_path / "sweep"
    shutil.copytree(runs / "<adamw>", sweep / "lr-1")
    (logs := sweep / "_sweeps/20261123-1").mkdir(parents=True)
    (logs / "lr-2.log").write_text("words\nerror: optim.lr=2 is <too> high\n")
    for number, (name, code) in enumerate([("lr-1", 0), ("lr-2", 2)]):
        job = JobResult(name, [], str(sweep / name), str(logs / f"{name}.log"), code)
        (logs / f"{number}.json").write_text(json.dumps(vars(job)))
    text = Page(write_report([sweep], tmp_path / "report")).text
    assert "lr-2: error: optim.lr=2 is <too> high" in text and "lr-1:" not in text.split("Failed")[1].split("Train")[0]


def test_a_folder_without_runs_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path)])
    assert exit.value.code == 2 and f"error: {tmp_path} holds no run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_without_a_word_on_its_console(runs, tmp_path, width, browser):
    page = browser.new_page(viewport={"width": width, "height": 3000})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(write_report([runs], tmp_path / "report").as_uri())
    assert page.locator("h1").is_visible() and said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.clientWidth])")
    assert len(images) == len(PICTURES) + 2
    assert all(natural > 1.9 * shown > 0.75 * 1.9 * width for natural, shown in images)  # sharp, and as wide as may be
