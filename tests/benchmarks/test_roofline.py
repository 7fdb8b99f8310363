"""The model of a step's time, by hand."""

import pytest

from benchmarks import plain
from benchmarks.roofline import Machine, Work, fitted, predict, show, step_seconds, work_of


def test_the_table_has_plain_numbers(capsys):
    numbers = [1234567.8, 12345.6, 123.456, 0.0123456, 0.5, 2.0, 0.0, -9999.96]
    show([{"tokens_per_s": number} for number in numbers], "a title")
    shown = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert shown == ["1,234,568", "12,346", "123.5", "0.01235", "0.5", "2", "0", "-10,000"]
    assert plain(1.5e-7) == "1.5e-07" and plain(float("inf")) == "inf"


def test_sending_hides_behind_the_backward_except_what_comes_last():
    assert step_seconds(1, 2, 0.5, all_s=1.5, last_s=0.25) == 1 + 2 + 0.25 + 0.5
    assert step_seconds(1, 2, 0.5, all_s=9.0, last_s=0.25) == 1 + 8.75 + 0.25 + 0.5


def test_a_process_alone_sends_nothing_and_a_ring_sends_almost_twice():
    work = Work(forward=100, backward=200, gradients=400, last=100, optimizer=700)
    alone = Machine("one", flops=2000, memory=100)
    assert predict(work, alone, tokens=10) == 1 + 2 + 7
    four = Machine("four", flops=2000, memory=100, processes=4, link=50)  # sends 1.5 times 400 and 100 bytes
    assert predict(work, four, tokens=10) == pytest.approx(1 + max(2, 9) + 3 + 7)


def test_the_work_of_a_method_is_counted_from_its_model():
    dense, grass = (work_of(method, "nano", 64, 256, "float32") for method in ("adamw", "grass"))
    assert dense.backward == 2 * dense.forward and grass.forward == dense.forward
    linears = 4 * (4 * 256 * 256 + 3 * 256 * 688)  # four blocks of q, k, v, o and gate, up, down
    assert dense.backward - grass.backward == 2 * linears * (1 - 64 / 256)
    assert dense.gradients - grass.gradients == 4 * linears * (1 - 64 / 256)
    assert dense.last == grass.last


def test_the_fit_takes_the_computing_from_the_fastest_link_and_predicts_the_others():
    work = work_of("adamw", "nano", 64, 256, "float32")
    sent = work.gradients * 8e-6 / 100
    fast = 3.0 + work.last * 8e-6 / 1000
    run = {"size": "nano", "rank": 64, "ranks": 2}
    runs = [run | {"mbit": mbit, "rows": [{"method": "adamw", "regular_s": fast}]} for mbit in (100, 1000)]
    (slow,) = fitted(runs)
    assert slow["mbit"] == 100
    assert slow["model_s"] == pytest.approx(1.0 + max(2.0 + work.last * 8e-6 / 100, sent))
