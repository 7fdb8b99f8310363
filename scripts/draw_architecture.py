"""Draw docs/architecture.svg from the imports of the code, and write the tree in docs/architecture.md from its folders.

    .venv/bin/python scripts/draw_architecture.py

A box is a room: a sub-package, a file of data/, the commands of pretrain/, or a complete package. An arrow means that
the upper room imports the lower one. Arrows that follow from others are left out; the SVG's metadata has all of them.
"""

import ast
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE, PAGE = ROOT / "docs" / "architecture.svg", ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"
COLOURS = {"benchmarks": "#f3e8ff", "pretrain": "#dbeafe", "optim": "#dcfce7", "models": "#dcfce7", "data": "#fef3c7"}
COLUMNS = [("benchmarks", "pretrain"), ("optim", "models"), ("data",)]  # packages, left to right
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 196, 58, 20, 34, 24

Edges = dict[str, set[str]]  # room → rooms that it imports


def room_of(file: Path) -> str:
    """The room of a file, whose path is relative to the repository."""
    package, *inner = file.parts
    if package == "data":
        return "/".join(file.parts[:2])
    if package == "pretrain":
        return f"pretrain/{inner[0]}" if len(inner) > 1 else "pretrain/*.py"
    return package


def modules() -> dict[str, Path]:
    """The files of all packages by the name of their module; packages' own files are left out."""
    files = (file.relative_to(ROOT) for package in COLOURS for file in sorted((ROOT / package).rglob("*.py")))
    return {".".join(file.with_suffix("").parts): file for file in files if file.name != "__init__.py"}


def imported(file: Path) -> Iterator[str]:
    """Every name that may be a module in the file's imports, also of those inside functions."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_between_rooms() -> Edges:
    """The imports between rooms. Every room is a key."""
    known = modules()
    edges: Edges = {room_of(file): set() for file in known.values()}
    for file in known.values():
        rooms = {room_of(known[name]) for name in imported(file) if name in known}
        edges[room_of(file)] |= rooms - {room_of(file)}
    return edges


def below(edges: Edges, room: str) -> set[str]:
    """The rooms that a room imports, directly or through others."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def reduced(edges: Edges) -> list[tuple[str, str]]:
    """The edges that do not follow from others.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    reach = {room: below(edges, room) for room in edges}
    circle = sorted(room for room in edges if room in reach[room])
    if circle:
        raise ValueError(f"these rooms import each other in a circle: {', '.join(circle)}")
    return sorted(
        (upper, lower) for upper in edges for lower in edges[upper] if not any(lower in reach[r] for r in edges[upper])
    )


def levels(edges: Edges) -> dict[str, int]:
    """Rows of the rooms from the top. A room that no other room imports is just above the first one that it imports."""
    above = defaultdict(set)
    for upper, lowers in edges.items():
        for lower in lowers:
            above[lower].add(upper)

    def level(room: str) -> int:
        return 1 + max((level(upper) for upper in above[room]), default=-1)

    rows = {room: level(room) for room in edges}
    tops = {room: min(rows[lower] for lower in edges[room]) - 1 for room in edges if not above[room] and edges[room]}
    return rows | tops


def placed(edges: Edges) -> dict[str, tuple[int, int]]:
    """The upper left corner of each room's box. Each group of packages has a band of columns of its own."""
    rows, corners, left = levels(edges), dict[str, tuple[int, int]](), MARGIN
    for packages in COLUMNS:
        by_row = defaultdict(list)
        for room in sorted(edges):
            if room.split("/")[0] in packages:
                by_row[rows[room]].append(room)
        widest = max(map(len, by_row.values()))
        band = widest * WIDTH + (widest - 1) * GAP_X
        for row, rooms in by_row.items():
            start = left + (band - len(rooms) * WIDTH - (len(rooms) - 1) * GAP_X) // 2
            for place, room in enumerate(rooms):
                corners[room] = (start + place * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y))
        left += band + 3 * GAP_X
    return corners


def subject(room: str) -> str:
    """The first words of the docstring of a room's package or file; of commands their names."""
    if room.endswith("/*.py"):
        return ", ".join(sorted(file.stem for file in ROOT.glob(room) if file.stem != "__init__"))
    path = ROOT / room
    file = path if path.suffix == ".py" else path / "__init__.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:;]\s|\n", text)[0].rstrip(".")


def box(room: str, corner: tuple[int, int]) -> str:
    x, y = corner
    lines = textwrap.wrap(subject(room), 36, max_lines=2, placeholder=" …")
    words = "".join(
        f'<text x="{x + WIDTH // 2}" y="{y + 33 + 13 * i}" font-size="10">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    fill = COLOURS[room.split("/")[0]]
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#475569"/>'
        f'<text x="{x + WIDTH // 2}" y="{y + 18}" font-size="13" font-weight="bold">{room}</text>{words}'
    )


def arrow(upper: tuple[int, int], lower: tuple[int, int]) -> str:
    x1, y1 = upper[0] + WIDTH // 2, upper[1] + HEIGHT
    x2, y2 = lower[0] + WIDTH // 2, lower[1] - 4
    middle = (y1 + y2) // 2
    return f'<path d="M {x1} {y1} C {x1} {middle}, {x2} {middle}, {x2} {y2}" marker-end="url(#head)"/>'


def drawing() -> str:
    """The picture as SVG."""
    edges = imports_between_rooms()
    arrows, corners = reduced(edges), placed(edges)
    width = max(x for x, _ in corners.values()) + WIDTH + MARGIN
    height = max(y for _, y in corners.values()) + HEIGHT + MARGIN
    every = json.dumps({room: sorted(lowers) for room, lowers in sorted(edges.items())})
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f"<metadata>{escape(every, quote=False)}</metadata>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M 0 0 L 8 4 L 0 8 z" fill="#475569"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<g fill="none" stroke="#94a3b8" stroke-width="1.5">',
        *(arrow(corners[upper], corners[lower]) for upper, lower in arrows),
        '</g><g text-anchor="middle">',
        *(box(room, corner) for room, corner in sorted(corners.items())),
        "</g></svg>\n",
    ])  # fmt: skip


def tree() -> str:
    """The folders of the packages, the first words of their docstrings, and their files."""
    folders = sorted({(ROOT / file).parent for file in modules().values()})
    lines = []
    for folder in folders:
        name = folder.relative_to(ROOT).as_posix()
        files = " ".join(sorted(file.stem for file in folder.glob("*.py") if file.name != "__init__.py"))
        lines += [
            f"{name + '/':24}{subject(name)}",
            *textwrap.wrap(files, 112, initial_indent="    ", subsequent_indent="    "),
        ]
    return "```text\n" + "\n".join(lines) + "\n```"


def page() -> str:
    """docs/architecture.md with the tree of now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{tree()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
