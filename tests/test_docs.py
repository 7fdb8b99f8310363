"""The documentation builds without a warning, and every file, test, module and anchor that it names exists."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from markdown.extensions.toc import slugify

MODULE = re.compile(r"python3? -m ((?:benchmarks|data|pretrain)(?:\.\w+)+)")
PATH = re.compile(r"(?<![\w/.])((?:benchmarks|conf|data|models|optim|pretrain|scripts|tests)/[\w/.]*\w)(?:::(\w+))?")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def pages(root):
    """The Markdown files that people read, with their text."""
    paths = [root / "README.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md", *sorted(root.glob("docs/*.md"))]
    return {path: path.read_text() for path in paths}


def anchors(text):
    """The anchors of a page's headings, as mkdocs makes them."""
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def test_the_site_builds_without_warnings(root, tmp_path):
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    assert "GrassLinear" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_every_page_is_in_the_navigation(root):
    navigation = (root / "mkdocs.yml").read_text().partition("nav:")[2]
    named = re.findall(r"[\w-]+\.md", navigation)
    assert sorted(named) == sorted(path.name for path in root.glob("docs/*.md"))


def test_every_link_leads_to_a_file_and_a_heading(root):
    texts, checked = pages(root), 0
    for page, text in texts.items():
        for target, anchor in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.S)):
            if re.match(r"\w+:", target):
                continue
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(texts[path]), f"{page.name}: {target}#{anchor}"
                checked += 1
    assert checked > 50


def test_every_file_and_test_that_is_named_exists(root):
    tests = 0
    for page, text in pages(root).items():
        for name, test in PATH.findall(text):
            assert (root / name).exists(), f"{page.name}: {name}"
            if test:
                assert f"\ndef {test}(" in (root / name).read_text(), f"{page.name}: {name}::{test}"
                tests += 1
    assert tests > 9


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs"])
def test_every_module_that_is_run_exists(root, name):
    texts = [text for page, text in pages(root).items() if name in (page.name, page.parent.name)]
    named = set(MODULE.findall("".join(texts)))
    for module in named:
        assert importlib.util.find_spec(module), module


def test_every_footnote_is_referred_to_and_defined(root):
    for page, text in pages(root).items():
        defined = re.findall(r"^\[\^(\w+)\]:", text, re.M)
        referred = set(re.findall(r"\[\^(\w+)\](?!:)", text))
        assert len(defined) == len(set(defined)) and set(defined) == referred, page.name
