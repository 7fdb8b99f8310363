"""``python -m benchmarks.gpu`` where there is no GPU: its command line, dry runs, what it keeps, and its page."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.correctness import compared
from benchmarks.gpu.expected import AIMS, roofline
from benchmarks.gpu.learning import Learned
from benchmarks.gpu.page import BEGIN, END, body, write_page
from benchmarks.gpu.results import DONE, RUNNING, Results, load
from benchmarks.gpu.sections import SECTIONS, Section, chosen
from benchmarks.gpu.step_times import CASES, METHODS, Contender, configuration, summarise

HIDDEN = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(root, *arguments, timeout=300):
    called = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(called, cwd=root, env=HIDDEN, capture_output=True, text=True, timeout=timeout)


def record(rows, **changed):
    return {
        "began": "2026-11-27T12:00:00", "commit": "0123456789abcdef", "dry": False, "device": "NVIDIA H100",
        "computes": True, "torch": "2.13.0", "seconds": 12.3, "ended": DONE, "rows": rows, **changed,
    }  # fmt: skip


# The command line.


def test_help_names_every_section_and_loads_no_torch(root):
    done = command(root, "--help", timeout=60)
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in SECTIONS)
    loaded = "import benchmarks.gpu.__main__, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=root, timeout=60).returncode == 0


def test_without_a_gpu_it_says_so_and_measures_nothing(root, tmp_path):
    done = command(root, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "No GPU that torch can use" in done.stderr and "--dry" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_name_stands_for_itself_or_for_all_that_begin_with_it():
    assert [s.name for s in chosen("step_times_1b,machine")] == ["machine", "step_times_1b"]
    memory = ["memory_13b_eager", "memory_13b_compiled", "memory_1b_eager", "memory_1b_compiled"]
    assert [s.name for s in chosen("memory", skip="memory_7b")] == memory
    assert len(chosen()) == len(SECTIONS)
    with pytest.raises(ValueError, match="speed is no section; choose from machine"):
        chosen("speed")
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "speed"])


def test_sections_that_the_budget_leaves_too_little_for_are_skipped(tmp_path, capsys):
    assert runner.run_all(list(SECTIONS.values()), Results(tmp_path, dry=True), budget=10)
    assert capsys.readouterr().out.count("skipped") == len(SECTIONS)
    assert not list(tmp_path.iterdir())


# Dry runs.


def check_dry(root, folder, *arguments, timeout):
    done = command(root, "--dry", "--out", folder, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    records = load(folder / "gpu.json")
    for name, one in records.items():
        assert one["ended"] == DONE and one["dry"] and one["rows"], name
        assert not [row for row in one["rows"] if "fails" in row]
    return {name: one["rows"] for name, one in records.items()}


def test_a_dry_run_of_the_cpu_against_itself_finds_no_difference(root, tmp_path):
    rows = check_dry(root, tmp_path, "--only", "exactness,correctness", timeout=300)
    assert rows.keys() == {"exactness", "correctness"}
    assert all(row.get("different") == 0 or row.get("skipped") == "needs a GPU" for row in rows["exactness"])
    fp32 = [row for row in rows["correctness"] if row["way"] == "fp32"]
    assert [row["method"] for row in fp32] == ["grass+muon", "grass+adamw", "adamw"]
    assert all(row["worst"] == 0 and row["same_rows"] == row["layers"] and row["last"] < row["first"] for row in fp32)
    bf16 = [row for row in rows["correctness"] if row["way"] == "bf16"]
    assert all(0 < row["worst"] < 0.03 for row in bf16)


@pytest.mark.slow
def test_every_section_runs_dry_and_its_page_can_be_made(root, tmp_path):
    rows = check_dry(root, tmp_path, "--budget", "5000", timeout=3000)
    assert rows.keys() == SECTIONS.keys()
    timed = {row["method"] for row in rows["step_times_350m"] if "lacks" not in row}
    assert timed >= set(METHODS) - {"adamw8bit", "galore"}
    assert all(row["of_adamw"] > 0 and row["low_ms"] <= row["high_ms"] for row in rows["step_times_1b"])
    page = write_page(tmp_path / "gpu.json", tmp_path / "page").read_text()
    assert "**A dry run: the numbers below mean nothing.**" in page
    assert all(f"### {name}: " in page for name in SECTIONS)


# What a call keeps.


def test_a_row_is_on_the_disk_at_once_and_a_section_that_fails_before_its_first_keeps_the_earlier_ones(tmp_path):
    results = Results(tmp_path, dry=False)
    results.begin("waits")
    results.add({"case": "adamw"})
    kept = load(tmp_path / "gpu.json")["waits"]
    assert kept["rows"] == [{"case": "adamw"}] and kept["ended"] == RUNNING
    results.end(1.0, DONE)
    again = Results(tmp_path, dry=False)
    again.begin("waits")
    again.end(1.0, "failed: of all things")
    assert load(tmp_path / "gpu.json")["waits"] == kept | {"seconds": 1.0, "ended": DONE}
    again.begin("waits")
    again.add({"case": "grass"})
    again.begin("memory_1b_eager")
    again.end(1.0, "failed: of all things")
    sections = load(tmp_path / "gpu.json")
    assert sections["waits"]["rows"] == [{"case": "grass"}]
    assert sections["memory_1b_eager"]["ended"].startswith("failed")


def test_a_section_that_cannot_run_is_said_to_have_failed(tmp_path, capsys):
    broken = Section("broken", "no_such_module", 1, "")
    assert not runner.run_all([broken], Results(tmp_path, dry=True), budget=100)
    assert load(tmp_path / "gpu.json")["broken"]["ended"].startswith("failed: ModuleNotFoundError")
    assert "broken: failed" in capsys.readouterr().out


def test_a_process_that_dies_or_hangs_leaves_the_rows_it_sent(tmp_path):
    results = Results(tmp_path, dry=True)
    for closes, ended in ((True, None), (False, "stopped, for it took too long")):
        results.begin("waits")
        ours, theirs = multiprocessing.Pipe(duplex=False)
        theirs.send((runner.ABOUT, {"device": "CPU"}))
        theirs.send((runner.ROW, {"case": "adamw"}))
        if closes:
            theirs.close()
        assert runner._receive(ours, results, time.monotonic() + 0.5) == ended
        assert load(tmp_path / "gpu.json")["waits"]["rows"] == [{"case": "adamw"}]
        assert results.current["device"] == "CPU"


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    (tmp_path / "gpu.json").write_text("[]")
    with pytest.raises(ValueError, match="no result file"):
        Results(tmp_path, dry=True)
    with pytest.raises(SystemExit, match="2"):
        main(["--written", str(tmp_path / "missing.json"), "--out", str(tmp_path)])


# What sections make of their measurements, by hand.


def contender(turns, **row):
    run = type("Run", (), {"config": configuration(CASES["350m"], "adamw", dry=False)})
    return Contender(run, {"flops_per_token": 10**9, **row}, turns, host_ms=[3.0, 1.0, 2.0])


def test_the_median_turn_counts_and_a_rare_refresh_is_spread_over_its_interval():
    turns = [[10.0, 30.0], [100.0, 100.0], [50.0, 50.0]]
    plain = summarise(contender(turns))
    assert plain["ms"] == 50 and plain["host_ms"] == 2 and plain["steps"] == 6
    assert plain["tokens_per_s"] == 16384 / 0.050 and plain["tflop_per_s"] == pytest.approx(16384 / 0.050 / 1e3)
    assert (plain["low_ms"], plain["median_ms"], plain["high_ms"]) == (35, 50, 87.5)
    assert summarise(contender(turns, refresh_every=200, refresh_ms=1000.0))["ms"] == 55


def test_methods_differ_in_what_their_names_say():
    # Every method at one size, and AdamW, whom the others are measured by, at all of them.
    for case, method in [
        *(("350m", method) for method in METHODS),
        *((case, CASES[case].methods[0]) for case in CASES),
    ]:
        config = configuration(CASES[case], method, dry=False)
        assert config.train.dtype == "bfloat16" and config.train.tokens_per_step == 16384
        paper = method.endswith("the paper's refresh")
        assert config.optim.name == ("grass_paper" if paper else "grass" if method.startswith("grass") else method)
        if paper:  # exact scores cost something only where a selection uses them
            assert (config.optim.selection, config.optim.score) == ("top_r", "exact")
        if method == "galore" or method.startswith("grass"):
            assert config.optim.rank == CASES[case].rank
    assert {case.methods[0] for case in CASES.values()} == {"adamw"}


def test_rows_are_compared_layer_by_layer_and_one_by_one():
    cpu = Learned([2.0, 1.0], {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3])}, [], False)
    here = Learned([2.0, 1.25], {"a": torch.tensor([0, 1]), "b": torch.tensor([3, 4])}, [], True)
    found = compared(here, cpu)
    assert (found["worst"], found["same_rows"], found["layers"], found["common_rows"]) == (0.25, 1, 2, 0.75)


# The page.

TIMED = [
    {"case": "350m", "method": "adamw", "tokens_per_s": 200_000.0, "ms": 81.92, "of_adamw": 1.0},
    {"case": "350m", "method": "grass", "tokens_per_s": 240_000.0, "ms": 68.27, "of_adamw": 1.2},
    {"case": "350m", "method": "galore", "lacks": "galore-torch (ImportError: none)"},
]
HELD = [
    {"case": "13b_40gb", "planned_gib": 35.68, "card_gib": 39.0, "peak_gib": 35.7, "taken_gib": 36.9},
    {"case": "13b_40gb compiled", "planned_gib": 35.68, "card_gib": 39.0, "fails": "OutOfMemoryError: x|y"},
]


def written(tmp_path, **sections):
    (tmp_path / "gpu.json").write_text(json.dumps({"sections": sections}))
    return tmp_path / "gpu.json"


def test_results_become_tables_and_pictures_beside_what_is_expected(root, tmp_path):
    results = written(tmp_path, step_times_350m=record(TIMED), memory_13b_eager=record(HELD))
    assert main(["--written", str(results), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "gpu.md").read_text()
    assert page.startswith((root / "docs/gpu.md").read_text().partition(BEGIN)[0]) and page.count(BEGIN) == 1
    shown = page.partition(BEGIN)[2].partition(END)[0]
    assert "| method | tokens/s | of AdamW's | ms a step | expected | remark |" in shown
    assert f"| grass | 240,000 | 1.200 | 68.3 | at least 1.10 (roofline {roofline('350m'):.2f}) |  |" in shown
    assert "| galore |  |  |  |  | lacks: galore-torch (ImportError: none) |" in shown
    assert "| 13b_40gb | 35.68 | 35.70 | 36.90 | at most 36.75 (3 % above the plan), of 39 |  |" in shown
    assert r"fails: OutOfMemoryError: x\|y |" in shown
    assert "2026-11-27, commit 0123456, NVIDIA H100, torch 2.13.0, 12 s" in shown and "mean nothing" not in shown
    for picture in ("gpu_step_times.png", "gpu_memory.png"):
        assert f"]({picture})" in shown and (tmp_path / "page" / picture).stat().st_size > 10_000
    assert load(tmp_path / "page" / "gpu.json") == load(results)


@pytest.mark.parametrize("why", [{"dry": True}, {"computes": False}])
def test_numbers_that_mean_nothing_are_marked_and_kept_out_of_the_documentation(root, tmp_path, why):
    results = written(tmp_path, step_times_350m=record(TIMED, **why))
    before = (root / "docs/gpu.md").read_text()
    with pytest.raises(ValueError, match="mean nothing"):
        write_page(results, root / "docs")
    assert (root / "docs/gpu.md").read_text() == before
    assert "the numbers below mean nothing" in write_page(results, tmp_path / "page").read_text()


def test_the_documentation_names_every_section_shows_the_roofline_and_the_results_that_are_kept(root):
    page = (root / "docs/gpu.md").read_text()
    table = page.partition("## What each section answers")[2].partition("## ")[0]
    assert all(f"`{section.name}`" in table or f"`{section.module}_" in table for section in SECTIONS.values())
    for size, aim in AIMS.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {size} "))
        assert f"{roofline(size):.3f} | at least {aim:.2f} |" in line
    if (root / "docs/gpu.json").exists():
        assert body(load(root / "docs/gpu.json"), sorted(root.glob("docs/gpu_*.png"))) in page
    else:
        assert "nothing has been run on a real GPU" in page.partition(BEGIN)[2]
