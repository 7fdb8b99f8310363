"""A run resumes without the files that only its start needed, and is identified by content and not by places."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from data.prepare import prepare
from data.train_tokenizer import train_tokenizer
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.inference.hf_export import export
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import prepare_data
from pretrain.setup.trained_data import data_settings
from pretrain.training.trainer import Trainer
from tests.tiny_runs import ALONE, losses, train

pytestmark = pytest.mark.usefixtures("logging_of_a_run")
TINY = [
    "data=text", "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "optim.rank=8", "optim.warmup_steps=1",
    "optim.schedule=constant", "train.tokens_per_step=128", "train.seq_len=32", "train.eval_sequences=4",
    "train.log_every=1", "train.eval_every=0", "train.compile=false", "train.sample_tokens=0", "data.root=prepared",
    "logger.wandb.mode=disabled", "run.root=runs", "data.paths=[text]", "data.validation_share=0.2",
]  # fmt: skip
RUN = [*TINY, "run.name=run", "data.tokenizer=tok.model", "train.init_from=start"]


def gone(*names):
    for name in names:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def moved(old, new):
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    Path(old).rename(new)


def exported():
    export(Path("start"), Path("hf"))
    gone("start")


def one_more_file():
    Path("text/more.py").write_text("print('more')\n" * 200)


def another_tokenizer():
    texts = [file.read_text() for file in sorted(Path("other").iterdir())]
    train_tokenizer(texts, Path("b.model"), 400, seed=0)


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    """A folder with a run of 4 steps, and all that it started from: text, tokenizer, weights, preparation."""
    here = tmp_path_factory.mktemp("made")
    for name in ("text", "other"):
        (here / name).mkdir()
        for file in sorted((root / ("optim" if name == "text" else "models")).glob("*.py")):
            shutil.copy2(file, here / name / file.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for seed in (0, 1):
            train([*TINY, f"run.name=first-{seed}", "train.steps=2", f"train.seed={seed}"])
        moved("runs/first-0", "start")
        shutil.copy("start/tokenizer.model", "tok.model")
        train([*RUN, "train.steps=4"])
    return here


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of that folder to work in."""
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    """The losses of the run when it resumes with everything in its place."""
    copy = tmp_path_factory.mktemp("expected") / "copy"
    shutil.copytree(made, copy, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        return losses(train([*RUN, "train.steps=6"])[0])


RESUMES = {  # before the resume, settings of it
    "weights gone": (partial(gone, "start"), []),
    "weights gone, setting left out": (partial(gone, "start"), ["train.init_from=null"]),
    "weights there, setting left out": (lambda: None, ["train.init_from=null"]),
    "weights moved": (partial(moved, "start", "models/a"), ["train.init_from=models/a"]),
    "weights by another way": (lambda: None, ["train.init_from=../copy/start/"]),
    "weights in another format": (exported, ["train.init_from=hf"]),
    "weights of a checkpoint": (lambda: None, ["train.init_from=start/checkpoints/step-00000002"]),
    "text gone": (partial(gone, "text"), []),
    "text moved": (partial(moved, "text", "corpora/code"), ["data.paths=[corpora/code]"]),
    "text gone, another place named": (partial(gone, "text"), ["data.paths=[nowhere]"]),
    "tokenizer gone": (partial(gone, "tok.model"), []),
    "tokenizer moved": (partial(moved, "tok.model", "a/b.model"), ["data.tokenizer=a/b.model"]),
    "all gone": (partial(gone, "start", "text", "tok.model"), []),
    "preparations moved": (partial(moved, "prepared", "disk/prepared"), ["data.root=disk/prepared"]),
    "run renamed": (partial(moved, "runs/run", "runs/a/b"), ["run.name=a/b"]),
    "run moved": (partial(moved, "runs/run", "old/run"), ["run.root=old"]),
    "preparation by another name": (lambda: None, ["data.name=code"]),
}


@pytest.mark.parametrize("case", RESUMES.values(), ids=RESUMES)
def test_a_run_resumes_without_what_only_its_start_needed(here, expected, case):
    before, settings = case
    before()
    folder, trainer = train([*RUN, "train.steps=6", *settings])
    assert losses(folder) == expected
    assert trainer.state_dict()["init_from"]["path"] == "start"


def test_preparations_are_found_at_a_new_place_without_the_text(here, expected):
    moved("prepared", "disk")
    gone("text", "start", "tok.model")
    assert losses(train([*RUN, "train.steps=6", "data.root=disk"])[0]) == expected


REFUSED = {  # before the resume, settings of it, words of the error
    "other weights": (lambda: None, ["train.init_from=runs/first-1"], "differs from the weights that the run"),
    "no weights there": (lambda: None, ["train.init_from=nowhere"], "cannot be compared with start"),
    "a file more": (one_more_file, [], "another corpus or tokenizer"),
    "another corpus": (lambda: None, ["data.paths=[other]"], r"data\.paths was .*text.*, is now .*other"),
    "another tokenizer": (another_tokenizer, ["data.tokenizer=b.model"], r"data\.tokenizer was tok.model, is now b"),
    "neither text nor tokens": (partial(gone, "text", "prepared"), [], r"data\.paths"),
    "another model": (lambda: None, ["optim.rank=4"], r"optim\.rank was 8, is now 4"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_other_content_is_refused_and_changes_nothing(here, case):
    before, settings, words = case
    before()
    files = {path: path.read_bytes() for path in Path("runs/run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=words):
        train([*RUN, "train.steps=6", *settings])
    assert {path: path.read_bytes() for path in Path("runs/run").rglob("*") if path.is_file()} == files


def test_a_run_that_did_not_start_from_weights_refuses_them(here):
    with pytest.raises(ValueError, match="this run did not start from other weights"):
        train([*TINY, "run.name=first-1", "train.seed=1", "train.steps=4", "train.init_from=start"])


def test_a_mixture_resumes_without_its_texts(here):
    parts = "data.mixture=[{weight: 3, paths: [text], name: a}, {weight: 1, paths: [other], name: b}]"
    mixture = [*TINY, "data=mixture", "data.paths=[]", parts, "data.tokenizer=tok.model", "run.name=mixed"]
    train([*mixture, "train.steps=2"])
    gone("text", "other", "tok.model")
    folder, _ = train([*mixture, "train.steps=4"])
    assert len(losses(folder)) == 4 and json.loads(folder.summary_file.read_text())["steps"] == 4


@pytest.mark.parametrize("validation", [[], ["data.validation_paths=[other]"]])
def test_a_run_that_streamed_its_data_resumes_without_the_text_once_all_is_prepared(here, validation):
    stream = [*TINY, "data.tokenizer=tok.model", "data.on_the_fly=true", "data.shuffle_block=8", "train.eval_every=2"]
    stream += validation
    for name in ("whole", "halves"):
        train_streaming([*stream, f"run.name={name}", "train.steps=4"])
    prepare(data_settings(load(stream)))
    whole = train_streaming([*stream, "run.name=whole", "train.steps=8"])
    gone("text", "other", "tok.model")
    halves = train_streaming([*stream, "run.name=halves", "train.steps=8"])
    lines = [map(json.loads, folder.metrics_file.read_text().splitlines()) for folder in (whole, halves)]
    ours, theirs = ([(x.get("train/loss"), x.get("val/loss")) for x in of_run] for of_run in lines)
    assert ours == theirs and len(ours) == 8 + 5


def test_a_run_that_streamed_its_data_resumes_when_the_text_comes_back(here):
    stream = [*TINY, "data.tokenizer=tok.model", "data.on_the_fly=true", "data.shuffle_block=8", "run.name=back"]
    train_streaming([*stream, "train.steps=2"])
    prepare(data_settings(load(stream)))
    moved("text", "away")
    train_streaming([*stream, "train.steps=4"])
    moved("away", "text")
    assert len(losses(train_streaming([*stream, "train.steps=6"]))) == 6


def train_streaming(overrides):
    config = load(overrides)
    folder = RunFolder(config)
    with folder.locked(), prepare_data(config, 1)(ALONE) as data:
        Trainer(config, ALONE, data, folder, StopRequest()).fit()
    return folder
