"""A run on a GPU in bfloat16 whose sizes make products slow is told so."""

import logging

import pytest
import torch

from models.llama import odd_sizes
from pretrain.config.compose import load
from pretrain.setup import model as build

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_size_is_named_with_the_next_that_are_aligned():
    assert odd_sizes(hidden_size=2048, intermediate_size=5504, vocab_size=32000) == []
    (message,) = odd_sizes(hidden_size=2048, intermediate_size=5461, vocab_size=32000)
    assert "model.intermediate_size=5461 " in message and "use 5464, or better 5504," in message


@pytest.mark.parametrize("dtype, device, count", [("bfloat16", CUDA, 1), ("float32", CUDA, 0), ("bfloat16", CPU, 0)])
def test_it_is_said_once_and_only_where_it_matters(dtype, device, count, caplog, monkeypatch):
    monkeypatch.setattr(build, "materialise", lambda config, model, *_: model)  # there is no GPU here
    build.warn_of_odd_sizes.cache_clear()
    overrides = ["model.hidden_size=64", "model.intermediate_size=171", "model.num_hidden_layers=1"]
    config = load([*overrides, f"train.dtype={dtype}", "optim.rank=8"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            build.build_model(config, device)
    assert len(caplog.messages) == count
    assert all(message.startswith("model.intermediate_size=171 is not a multiple of 8") for message in caplog.messages)
