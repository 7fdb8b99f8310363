"""What the benchmarks of speed make of their measurements, by hand."""

import pytest

from benchmarks.growth import slope
from benchmarks.overhead import measure as overhead
from benchmarks.step_time import compared, plot, relative_at, shape_of, written
from benchmarks.steps import add_lora
from models.flops import flops_per_token, peak_of
from models.llama import Llama
from pretrain.config.compose import load


def row(method, tokens_per_s, flops):
    return {"method": method, "tokens_per_s": tokens_per_s, "flops_per_token": flops, "peak_bytes": 2**31}


def test_the_limit_of_a_method_is_what_it_would_reach_at_the_dense_model_s_flops_a_second():
    grass, adamw = compared([row("grass", 125.0, 70), row("adamw", 100.0, 100)])
    assert grass["limit_ratio"] == pytest.approx(125 / (100 * 100 / 70)) and adamw["limit_ratio"] == 1
    assert (grass["of_the_first"], adamw["of_the_first"]) == (1, 0.8)
    assert compared([row("grass", 125.0, 70)])[0]["limit_ratio"] is None


def test_at_more_tokens_a_step_the_optimizer_counts_for_less():
    parts = {"tokens_per_s": 10.0, "step_s": 10.0, "forward_s": 1.0, "refresh_s": 4.0, "refresh_every": 4}  # 100 tokens
    first, other = {**parts, "backward_s": 2.0, "optimizer_s": 6.0}, {**parts, "backward_s": 1.0, "optimizer_s": 1.0}
    assert relative_at(other, first, tokens=100) == pytest.approx((3 + 6 + 1) / (2 + 1 + 1))
    assert relative_at(other, first, tokens=1000) == pytest.approx((30 + 6 + 1) / (20 + 1 + 1))


def test_every_recorded_measurement_is_drawn(root, tmp_path):
    rows = written(root / "docs/step_time.jsonl")
    assert {"60m", "130m", "350m"} <= {row["size"] for row in rows}
    plot(rows, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000


def test_a_single_block_is_one_of_that_model_with_next_to_no_head():
    model = load(shape_of("7b_block", batch=4, seq_len=256)).model
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (4096, 11008, 1)
    assert model.vocab_size == 256


def test_lora_trains_the_adapters_and_what_grass_trains_in_full():
    model = Llama(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    dense = flops_per_token(model, 16)
    add_lora(model, rank=4)
    # Of a linear in → out both adapters, in + out by 4: three products each; of its own weight two are left.
    features = 2 * (4 * (32 + 32) + 3 * (32 + 48))
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert flops_per_token(model, 16) == dense - 2 * weights + 6 * 4 * features
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * features + 2 * 64 * 32 + 5 * 32


def test_the_peak_of_a_gpu_is_found_by_its_name_and_only_for_what_its_tensor_cores_do():
    assert peak_of("NVIDIA A100-SXM4-80GB", "bfloat16", "highest") == 312e12
    assert peak_of("NVIDIA H100 80GB HBM3", "float32", "high") == 494e12
    assert peak_of("NVIDIA H100 PCIe", "bfloat16", "highest") == 756e12
    assert peak_of("NVIDIA H200", "bfloat16", "highest") == 989e12
    assert [peak_of("NVIDIA H200 NVL", dtype, "high") for dtype in ("bfloat16", "float32")] == [835e12, 417e12]
    assert peak_of("NVIDIA A100-SXM4-80GB", "float32", "highest") is None
    assert peak_of("NVIDIA L40", "bfloat16", "highest") is None


def test_a_slope_is_that_of_a_power_law():
    assert slope([1.0, 2.0, 4.0, 8.0], [3 * x**1.5 for x in (1.0, 2.0, 4.0, 8.0)]) == pytest.approx(1.5)


@pytest.mark.slow
def test_the_trainer_keeps_ninety_seven_hundredths_of_a_bare_loop_s_speed():
    assert overhead([])["ratio"] >= 0.97
