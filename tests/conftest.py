"""What several test files need."""

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
