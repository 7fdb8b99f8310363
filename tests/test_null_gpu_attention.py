"""The host's side of attention on a GPU (tests/null_gpu): kernels, graphs, waits. The stand-ins have no cuDNN."""

import json

import pytest

from tests.test_null_gpu import NULL_GPU, null_gpu, run  # noqa: F401

pytestmark = [pytest.mark.null_gpu, pytest.mark.usefixtures("null_gpu")]
SAID = {
    ("torch.bfloat16", True): "attention within documents: torch's varlen_attn, flash kernel",
    ("torch.bfloat16", False): "attention: torch's SDPA, flash kernel",
    ("torch.float32", True): "attention within documents: torch's SDPA, memory-efficient kernel",
    ("torch.float32", False): "attention: torch's SDPA, memory-efficient kernel",
}


def test_every_call_has_a_fused_kernel_that_is_said_and_no_step_waits():
    """Grouped heads, forward and backward. A wait ends the command: what is run sees to that."""
    lines = [json.loads(line) for line in run("python", NULL_GPU / "attention.py").splitlines() if line[0] == "{"]
    assert len(lines) == 24
    for line in lines:
        kernel = "flash" if line["dtype"] == "torch.bfloat16" else "efficient"
        assert line["said"] == [SAID[line["dtype"], line["apart"]]]
        assert line["calls"] == {f"{kernel}_attention_forward": 2 if line["mode"] == "full" else 1}, line
        assert line["graphs"] == line["compiled"], line  # one for all blocks, whatever the number of documents
