"""What several test files need."""

import logging
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium: the machine's own, or the one that playwright has installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = shutil.which("chromium") or shutil.which("google-chrome")
        if not own and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium here, and none could be installed: see .venv/browser.log")
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        chromium = playwright.chromium.launch(executable_path=own, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def corpus(root, tmp_path_factory):
    """Overrides for a small corpus of real text: a few of the project's own files."""
    prepared = tmp_path_factory.mktemp("prepared")
    return [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={prepared}", "data.validation_share=0.2"]


@pytest.fixture
def logging_of_a_run():
    """Log as a run does, and undo what it set up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.setLevel(logging.INFO)
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def overrides(corpus, logging_of_a_run, tmp_path):
    """Overrides of a run in a folder of its own, later ones winning."""
    from tests.tiny_runs import GRASS, TINY  # imports torch

    return lambda *more, grass=GRASS: [*TINY, *corpus, f"run.root={tmp_path}", "run.name=run", *grass, *more]
