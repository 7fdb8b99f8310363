"""The table of what methods hold, from rows worked by hand, and the copy of it in docs/memory_results.md."""

from benchmarks.memory_table import FOLDER, METHODS, PAPER, SIZES, known, table
from pretrain.planner.memory import GIB


def test_the_table_adds_up_a_row_and_leaves_out_what_nobody_holds():
    row = {"size": "13b", "method": "Grass", "weights": 2 * GIB, "rows": GIB // 2, "sketch": 0, "refresh": 3 * GIB}
    lines = table({("13b", "Grass"): row}).splitlines()
    assert lines[0] == "| size | method | weights | rows | a step | a refresh |"
    assert lines[2] == "| 13b | Grass | 2.00 | 0.50 | 2.50 | 3.00 |"
    assert (
        lines[3] == f"| 13b | Adam, *reported by the paper* | {PAPER['weights']} |  | at least 102 (the parts: 99) |  |"
    )


def test_the_documents_show_every_row_that_was_estimated():
    rows = known(FOLDER / "memory.jsonl")
    assert rows.keys() == {(size, method) for size in SIZES for method in METHODS}
    page = (FOLDER / "memory_results.md").read_text()
    ordered = {(size, method): rows[size, method] for size in SIZES for method in METHODS}
    assert table(ordered) in page
