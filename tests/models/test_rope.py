"""Scaled rotary positions, held against transformers at positions beyond those of the first training."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.kv_cache import KVCache
from models.llama import Llama
from models.rope import rope_tables, scaling_problems
from models.weights import fill_weights

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 600, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALINGS = {"llama3": LLAMA3, "linear": {"rope_type": "linear", "factor": 4.0}}
IDS = torch.randint(96, (1, 600), generator=torch.Generator().manual_seed(0))


def both(scaling, dtype=torch.float64):
    """A model of transformers with this scaling, and ours with its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, initializer_range=0.2, rope_parameters={**scaling, "rope_theta": 500.0}, attn_implementation="eager"
    )
    theirs = LlamaForCausalLM(config).to(dtype).eval()
    ours = Llama(**SIZES, rope_theta=500.0, rope_scaling=scaling).to_dtype(dtype).eval()
    fill_weights(ours, [(name.removeprefix("model."), p.detach()) for name, p in theirs.named_parameters()], "theirs")
    return theirs, ours


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@torch.no_grad()
def test_logits_at_long_positions_are_those_of_transformers(scaling):
    theirs, ours = both(scaling)
    expected = theirs(IDS).logits
    # transformers computes the rotary tables in float32.
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-3)
    plain = Llama(**SIZES, rope_theta=500.0).to_dtype(torch.float64)
    plain.load_state_dict(ours.state_dict())
    assert (plain(IDS) - expected)[:, 300:].abs().max() > 0.1


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@torch.no_grad()
def test_tokens_from_a_cache_have_the_same_positions(scaling):
    _, ours = both(scaling)
    caches = [KVCache(600) for _ in ours.layers]
    parts = [ours(part, caches=caches) for part in (IDS[:, :500], IDS[:, 500:501], IDS[:, 501:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(IDS), rtol=0, atol=1e-9)


def test_frequencies_of_llama3_worked_by_hand():
    # theta = 16 and 8 features: frequencies 1, 1/2, 1/4, 1/8. In 16π positions they turn 8, 4, 2 and 1 times.
    scaling = {**LLAMA3, "factor": 10, "original_max_position_embeddings": 16 * math.pi}
    cos, sin = rope_tables(2, 8, 16.0, like=torch.zeros((), dtype=torch.float64), scaling=scaling)
    angles = torch.atan2(sin, cos)[1, 0, :4]
    # 2 turns lie a third of the way from 1 to 4.
    expected = torch.tensor([1, 1 / 2, (2 / 3 / 10 + 1 / 3) / 4, 1 / 8 / 10], dtype=torch.float64)
    torch.testing.assert_close(angles, expected)


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type=yarn is unknown; choose linear or llama3"),
        ("llama3", "set it to null or to a mapping such as {rope_type:linear,factor:4.0}"),
        ({"type": "linear", "factor": 2.0}, "rope_type=None is unknown"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor=0 must be a number above 0"),
        ({"rope_type": "linear", "factor": True}, "factor=True must be a number above 0"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1}, "has no beta_fast; leave it out"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor must be below high_freq_factor"),
    ],
)
def test_a_wrong_scaling_is_named_with_its_fix(scaling, problem):
    (found,) = scaling_problems(scaling)
    assert problem in found and found.startswith("model.rope_scaling")
    with pytest.raises(ValueError, match="rope_scaling"):
        Llama(**SIZES, rope_scaling=scaling)
