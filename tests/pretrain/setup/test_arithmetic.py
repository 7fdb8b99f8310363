"""What train.matmul_precision and train.deterministic set, by a stand-in for a GPU."""

import os

import pytest
import torch

from pretrain.config.compose import load
from pretrain.setup.arithmetic import set_arithmetic

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Undoes what a test sets for the whole process."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    tuned, filled = torch._inductor.config.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "none")  # so that it is taken back too
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch._inductor.config.deterministic = tuned
    torch.utils.deterministic.fill_uninitialized_memory = filled


def state():
    return (
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(), torch._inductor.config.deterministic,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )  # fmt: skip


def test_on_a_cpu_nothing_is_set():
    before = state()
    set_arithmetic(load(["train.deterministic=true", "train.matmul_precision=medium"]), CPU)
    assert state() == before


def test_a_deterministic_run_uses_no_algorithm_of_varying_order():
    set_arithmetic(load(["train.deterministic=true"]), GPU)
    assert state() == ("high", True, False, True, ":4096:8")
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "float32 matmuls in TF32 (train.matmul_precision=high)"),
        (
            ["train.matmul_precision=highest"],
            "full float32 (train.matmul_precision=highest; high is several times faster)",
        ),
        (["train.dtype=bfloat16"], ""),
    ],
)
def test_the_precision_of_float32_products_is_said_where_there_are_some(overrides, said, caplog):
    with caplog.at_level("INFO"):
        set_arithmetic(load(overrides), GPU)
    assert said in caplog.text and bool(caplog.text) == bool(said)
    assert not torch.are_deterministic_algorithms_enabled()
