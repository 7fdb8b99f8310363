"""The plot style that every figure of the project shares."""

import subprocess

import matplotlib
import pytest
from PIL import Image

from pretrain.runs.figures import COLOURS, DPI, WIDTH, new_figure, save


def test_every_figure_of_the_project_is_made_in_this_style(root):
    found = subprocess.run(
        ["git", "grep", "-lE", r"pyplot|Figure\(", "--", "*.py"], cwd=root, capture_output=True, text=True
    )
    assert {*found.stdout.split()} - {"tests/pretrain/runs/test_figures.py"} == {"pretrain/runs/figures.py"}


@pytest.mark.parametrize(("grid", "lines"), [("both", (True, True)), ("x", (True, False)), ("none", (False, False))])
def test_a_figure_has_the_style_and_leaves_matplotlib_s_settings_alone(grid, lines, tmp_path):
    before = dict(matplotlib.rcParams)
    with new_figure(4, 3, grid) as figure:
        axes = figure.add_subplot()
        axes.plot([1, 2], [3, 4])
    assert dict(matplotlib.rcParams) == before
    assert axes.lines[0].get_color() == COLOURS[0]
    assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()
    assert (axes.xaxis.get_gridlines()[0].get_visible(), axes.yaxis.get_gridlines()[0].get_visible()) == lines
    assert Image.open(save(figure, tmp_path / "a.png")).size == (4 * DPI, 3 * DPI)


def test_the_pictures_of_the_documentation_can_be_read_at_400_pixels(root):
    """Those drawn at this width have letters of nearly 10 pixels there."""
    widths = {path.name: Image.open(path).width for path in root.glob("docs/*.png")}
    assert len(widths) > 7 and set(widths.values()) == {WIDTH * DPI}, widths


def test_the_same_figure_has_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        with new_figure(4, 3) as figure:
            figure.add_subplot().plot([1, 2], [3, 4])
            save(figure, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
