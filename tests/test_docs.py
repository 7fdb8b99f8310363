"""The documentation builds without a warning, and every file, test, module and anchor that it names exists."""

import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys

import pytest
from markdown.extensions.toc import slugify

MODULE = re.compile(r"python3? -m ((?:benchmarks|data|pretrain)(?:\.\w+)+)")
PATH = re.compile(
    r"(?<![\w/.])((?:benchmarks|conf|data|examples|models|optim|pretrain|scripts|tests)/[\w/.]*\w)(?:::(\w+))?"
)
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


def test_no_docstring_of_the_api_page_has_columns(root):
    """Markdown would run the lines of an aligned list together into one paragraph."""
    names = re.findall(r"^::: ([\w.]+)$", (root / "docs" / "api.md").read_text(), re.M)
    assert len(names) > 20
    for name in names:
        module, _, member = name.rpartition(".")
        text = inspect.getdoc(getattr(importlib.import_module(module), member)) or ""
        assert not re.search(r"^\w+ {2,}\S", text, re.M), name


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


def test_the_readme_begins_with_memory_then_losses_and_says_what_it_takes(root):
    first_screen = (root / "README.md").read_text().partition("## Quick start")[0]
    assert re.findall(r"!\[.+\]\((.+)\)", first_screen) == ["docs/memory_overview.png", "docs/losses.png"]
    for said in (
        "by the planner",
        "Needs",
        "disk",
        "Python 3.10",
        "Not shown",
        "Tested with",
        "LICENSE",
        "CITATION.cff",
        "independent implementation",
    ):
        assert said in first_screen
    assert re.search(r"\[authors' repository\]\(\S+\)\s+holds\s+a\s+README\s+and\s+a\s+licence\.", first_screen)


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


def test_the_picture_and_the_tree_of_the_architecture_are_those_of_the_code(root):
    script = runpy.run_path(str(root / "scripts/draw_architecture.py"))
    advice = "run .venv/bin/python scripts/draw_architecture.py, and commit docs/architecture.*"
    assert script["drawing"]() == script["PICTURE"].read_text(), advice
    assert script["page"]() == script["PAGE"].read_text(), advice


def test_the_architecture_page_names_what_is_in_its_files(root):
    text = (root / "docs/architecture.md").read_text()
    named = re.findall(r"`([\w.]+)`\s+(?:in\s+|\()`([\w/]+\.py)`", text)
    assert len(named) > 20
    for names, file in named:
        code = (root / file).read_text()
        for name in names.split("."):
            assert re.search(rf"^\s*(def|class) {name}\b", code, re.M), f"{names} is not in {file}"


def test_the_imports_of_the_picture_are_those_that_grimp_finds(root):
    """Grimp is import-linter's own reader of imports."""
    grimp = pytest.importorskip("grimp")
    script = runpy.run_path(str(root / "scripts/draw_architecture.py"))
    files, room_of = script["modules"](), script["room_of"]
    graph = grimp.build_graph(*script["COLOURS"], cache_dir=None)
    expected = {room_of(file): set() for file in files.values()}
    for module, file in files.items():
        imported = graph.find_modules_directly_imported_by(module)
        expected[room_of(file)] |= {room_of(files[name]) for name in imported if name in files} - {room_of(file)}
    assert script["imports_between_rooms"]() == expected


def test_no_command_of_readme_and_docs_ends_in_a_comment(root):
    """An interactive zsh passes what follows a # to the command, unless it is told otherwise."""
    for page in [root / "README.md", *root.glob("docs/*.md")]:
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
        commented = [line for block in blocks for line in block.splitlines() if re.search(r"(^|\s)#", line)]
        assert commented == [], page.name


def test_overrides_with_brackets_braces_or_stars_are_quoted(root):
    """Shells change them otherwise: zsh and bash look for files, and bash expands braces."""
    texts = {page: re.sub(r"```python\n.*?```", "", text, flags=re.S) for page, text in pages(root).items()}
    for pattern in ("conf/**/*.yaml", "examples/*.py", "scripts/*.*", "launch.sh"):
        for file in root.glob(pattern):
            texts[file] = "\n".join(re.findall(r"^#.*", file.read_text(), re.M))  # of YAML, the header
    group = r"(?<![\w.'\"/])(?:run|train|optim|data|model|logger|hydra|estimate)\.[\w.]+"
    bare = {page.name: re.findall(rf"{group}=[^\s`'|]*[\[{{(*][^\s`]*", text) for page, text in texts.items()}
    assert {name: found for name, found in bare.items() if found} == {}
    assert sum(len(re.findall(r"'[\w.]+=[^\s']*[\[{]", text)) for text in texts.values()) > 20
