"""Reports of real runs, finished and unfinished; the page needs no other file."""

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
from pretrain.runs.charts import OTHERS, Group, as_json, charts_of, smooth
from pretrain.runs.folder import RunFolder
from pretrain.runs.records import find_runs, group_by_data, group_by_seed
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
    "grass_seed-0": ["optim.rank=8", "optim.selection=top_r", "optim.refresh_every=2"],
    "grass_seed-1": ["optim.rank=8", "optim.selection=top_r", "optim.refresh_every=2", "train.seed=1"],
    "<adamw>": ["optim=adamw"],
}
PICTURES = [
    "loss-tokens", "loss-time", "validation-tokens", "validation-time", "learning-rate", "gradient-norm", "captured",
    "covered", "speed", "memory",
]  # fmt: skip


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
    """Collects the text and the references of a page; fails on tags that are not closed in order."""

    def __init__(self, page: Path):
        super().__init__()
        self.open: list[str] = []
        self.text, self.references, self.data = "", [], ""
        self.feed(page.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.data = self.data or data  # the first script is the charts' data
        else:
            self.text += data

    @property
    def charts(self) -> dict:
        return {chart["name"]: chart for chart in json.loads(self.data)["charts"]}


def test_the_page_holds_every_chart_and_needs_no_other_file(runs, tmp_path):
    page = Page(write_report([runs], tmp_path))
    pictures = [*PICTURES, "coverage-grass_seed-0", "coverage-grass_seed-1"]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == sorted(pictures)
    assert page.references == ["data:,"] and [*page.charts] == PICTURES
    for name in pictures:
        picture = Image.open(tmp_path / f"{name}.png")
        assert picture.width == 1040 and len(picture.getcolors(1 << 24)) > 20
    for name in RUNS:
        summary = json.loads((runs / name / "summary.json").read_text())
        assert name in page.text and f"{summary['val/loss']:.4f}" in page.text
    assert "Samples of grass_seed-0" in page.text and "refresh_every: 2" in page.text


def test_the_charts_are_the_metrics_that_were_logged(runs, tmp_path):
    charts = Page(write_report([runs / "grass_seed-0"], tmp_path)).charts
    (run,) = find_runs([runs / "grass_seed-0"])
    for name, key in (
        ("validation-tokens", "val/loss"),
        ("gradient-norm", "train/grad_norm"),
        ("learning-rate", "train/lr"),
    ):
        (line,) = charts[name]["lines"]
        assert np.allclose(line["points"], np.transpose(run.series(key)), rtol=1e-5)
    assert charts["validation-tokens"]["lines"][0]["points"][0][0] == 0  # the loss before the first step
    assert len(charts["loss-tokens"]["lines"][0]["logged"][0]) == 8


def test_a_long_line_keeps_its_ends_and_its_spikes(runs, tmp_path):
    (run,) = find_runs([runs / "grass_seed-0"])
    y = np.ones(10_000)
    y[4321], y[7654], y[5000] = 99.0, 0.01, np.nan
    run.__dict__["lines"] = [{"step": i, "tokens": i, "train/grad_norm": float(v)} for i, v in enumerate(y)]
    (chart,) = charts_of([Group(0, "run", [run])], [m for m in OTHERS if m.name == "gradient-norm"])
    points = as_json(chart)["lines"][0]["points"]
    assert len(points) < 500 and {(0, 1), (4321, 99), (7654, 0.01), (9999, 1)} <= {(x, v) for x, v in points}


def test_settings_that_runs_share_are_in_the_header_and_others_in_a_table(runs, tmp_path):
    text = write_report([runs], tmp_path).read_text()
    header, rest = text.split("</header>")
    table = rest.split("Settings in which they differ")[1].split("</table>")[0]
    assert "<dt>train.steps</dt><dd>8</dd>" in header and "optim.name" not in header
    assert all(f">{key}<" in table for key in ("optim.name", "optim.refresh_every", "train.seed"))
    assert "train.steps" not in table and "run.name" not in table
    assert "in which they differ" not in write_report([runs / "<adamw>"], tmp_path).read_text()


def test_runs_on_other_data_have_a_ranking_and_charts_of_losses_of_their_own(runs, tmp_path):
    both = tmp_path / "both"
    for name in RUNS:
        shutil.copytree(runs / name, both / name)
    for state in (both / "<adamw>").glob("checkpoints/*/state.json"):
        changed = json.loads(state.read_text())
        changed["data"]["fingerprint"] = "other text"
        state.write_text(json.dumps(changed))
    page = write_report([both], tmp_path / "report")
    charts, text = Page(page).charts, page.read_text()
    assert [len(charts[name]["lines"]) for name in ("validation-tokens", "validation-tokens-2", "speed")] == [1, 1, 2]
    assert charts["validation-tokens"]["data"] != charts["validation-tokens-2"]["data"]
    first, second = text.split("<h2>Results</h2>")[1].split("<h2>")[0].split("<tbody>")[1:]
    assert ("&lt;adamw&gt;" in first) != ("&lt;adamw&gt;" in second)
    assert [part.count('class="best"') for part in (first, second)] in ([1, 0], [0, 1])  # none for a run by itself
    shutil.rmtree(both / "grass_seed-0/checkpoints")  # as before its first checkpoint
    assert len(group_by_data(find_runs([both / name for name in ("grass_seed-0", "grass_seed-1")]))) == 1
    assert len(group_by_data(find_runs([both]))) == 3  # it may be trained on either text


def test_a_perplexity_beyond_all_measure_is_short(runs, tmp_path):
    shutil.copytree(runs / "<adamw>", tmp_path / "diverged")
    line = {"step": 8, "tokens": 2048, "val/loss": 230.0, "val/perplexity": 1e100}
    with (tmp_path / "diverged/metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps({**line, "val/loss": float("nan")}) + "\n")
    page = Page(write_report([tmp_path / "diverged"], tmp_path / "report"))
    assert ">1e6" in page.text and page.charts["validation-tokens"]["lines"][0]["points"][-1] == [2048, 230]


def test_runs_that_differ_only_in_their_seed_are_one_curve(runs):
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


def test_a_run_with_only_its_first_line_is_shown(runs, tmp_path):
    shutil.copytree(runs / "grass_seed-0", tmp_path / "new")
    for file in ("summary.json", "selection.jsonl", "samples.md"):
        (tmp_path / "new" / file).unlink()
    first = (tmp_path / "new/metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "new/metrics.jsonl").write_text(first + "\n")
    assert "0 of 8" in Page(write_report([tmp_path / "new"], tmp_path / "report")).text


def test_the_coverage_picture_agrees_with_the_metrics(runs):
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


def test_the_moving_average_is_the_weighted_mean_of_earlier_values():
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
    assert "lr-2: error: optim.lr=2 is <too> high" in text and "lr-1:" not in text.split("Failed")[1].split("Charts")[0]


def test_a_folder_without_runs_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path)])
    assert exit.value.code == 2 and f"error: {tmp_path} contains no run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_without_messages_on_its_console(runs, tmp_path, width, scheme, browser):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(write_report([runs], tmp_path / "report").as_uri())
    assert page.locator("h1").is_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [chart.bounding_box() for chart in page.locator("figure svg").all()]
    assert len(boxes) == len(PICTURES) and all(box["width"] > (0.9 if width == 400 else 0.4) * width for box in boxes)
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1280)  # two columns where there is room

    page.locator("#validation-tokens svg").hover()
    assert page.locator("#validation-tokens .tip").is_visible()
    assert "<adamw>" in page.text_content("#validation-tokens .tip")
    lines = page.locator("#speed .mean")
    assert lines.count() == 2
    page.locator(".legend button").first.click()
    assert lines.count() == 1
    page.check("#log-x")
    assert page.locator("canvas").count() == 0  # maps are folded
    page.locator("details.coverage summary").first.click()
    assert page.locator("canvas").is_visible()

    by_loss = page.locator("th button", has_text="validation loss")
    for descending in (False, True):
        by_loss.click()
        shown = [float(row.split()[3]) for row in page.locator("table").first.locator("tbody tr").all_inner_texts()]
        assert shown == sorted(shown, reverse=descending)
    assert said == []


@pytest.mark.slow
def test_a_watched_page_reloads_and_keeps_what_its_reader_has_set(runs, tmp_path, browser, monkeypatch):
    monkeypatch.setattr("pretrain.runs.report_page.WATCH_SECONDS", 1)
    page = browser.new_page()
    file = write_report([runs], tmp_path, watched=True)
    assert not list(tmp_path.glob("*.png"))
    page.goto(file.as_uri())
    page.locator(".legend button").first.click()
    page.locator("details.coverage summary").first.click()
    file.write_text(file.read_text().replace("<h1>3 runs", "<h1>again"))
    page.wait_for_selector("h1:has-text('again')")
    page.wait_for_selector("canvas")
    assert page.locator("#speed .mean").count() == 1


def test_watching_writes_the_page_again_until_it_is_interrupted(runs, tmp_path, monkeypatch, capsys):
    times: list[str] = []

    def wait(_seconds):
        times.append((tmp_path / "index.html").read_text())
        (tmp_path / "index.html").unlink()
        if len(times) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.report.time.sleep", wait)
    main([str(runs), "--watch", "--out", str(tmp_path)])
    assert len(times) == 3 and all("data-reload" in text for text in times)
    assert "data-reload" not in (tmp_path / "index.html").read_text()  # written for good
    assert capsys.readouterr().out.startswith("watching: open ")
