"""The sizes that keep the code readable: files of one idea, functions that fit a screen, few commands in a package."""

import ast
import subprocess

import pytest

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_COMMANDS = 350, 50, 10
PACKAGES = ("models", "optim", "data", "pretrain", "benchmarks", "scripts", "examples")


@pytest.fixture(scope="module")
def sources(root):
    """The Python files of the packages by their path, as git knows them."""
    return files_of(root, *PACKAGES)


def files_of(root, *folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=root, capture_output=True, text=True, check=True)
    files = [root / name for name in listed.stdout.splitlines() if name.endswith(".py")]
    found = {file.relative_to(root): file.read_text(encoding="utf-8") for file in files if file.exists()}
    assert len(found) > 100
    return found


def test_no_file_is_too_long(root, sources):
    lengths = {str(name): text.count("\n") for name, text in (sources | files_of(root, "tests")).items()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_too_long(sources):
    functions = {
        f"{name}:{node.name}": node.end_lineno - node.lineno + 1
        for name, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in functions.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}


def test_a_package_has_commands_at_its_top_and_little_else(sources):
    assert len([name for name in sources if name.parts[:-1] == ("pretrain",)]) <= MOST_COMMANDS


def test_every_file_and_every_public_class_and_function_says_what_it_is(sources):
    without = []
    for name, text in sources.items():
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            without.append(str(name))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                without.append(f"{name}:{node.name}")
    assert without == []
