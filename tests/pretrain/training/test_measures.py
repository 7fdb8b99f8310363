"""What is measured, against numbers worked by hand and torch's own counters."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.convert import convert_linears
from models.flops import flops_per_token, parameter_counts
from models.llama import Llama
from optim.schedule import rate_factor, warmup_updates
from pretrain.distributed.world import World
from pretrain.training.throughput import Stopwatch
from pretrain.training.validation import Score, evaluate


class _FixedLogits(nn.Module):
    """Gives every target the loss ln 2 · (its number + 1)."""

    def forward(self, input_ids, targets):
        real = targets[targets != -100]
        return (math.log(2) * (real + 1).double()).sum()


def test_validation_weights_tokens_and_leaves_padding_out():
    batches = [
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 1, 2]])),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[3, -100, -100]])),
    ]
    tokenizer = SimpleNamespace(token_bytes=[1, 2, 3, 4], space_after=None)
    score = evaluate(_FixedLogits(), batches, tokenizer, World(0, 1, torch.device("cpu")))
    # 1 + 2 + 3 + 4 = 10 bits over 4 tokens and 1 + 2 + 3 + 4 = 10 bytes.
    assert (score.tokens, score.text_bytes) == (4, 10)
    assert score.metrics["val/loss"] == pytest.approx(2.5 * math.log(2), rel=1e-12)
    assert score.metrics["val/perplexity"] == pytest.approx(2**2.5, rel=1e-12)
    assert score.metrics["val/bits_per_byte"] == pytest.approx(1.0, rel=1e-12)


def test_a_space_that_the_tokenizer_puts_before_a_text_is_no_byte_of_it():
    bos, eos = 4, 5
    tokenizer = SimpleNamespace(token_bytes=[1, 2, 3, 4, 0, 0], space_after=bos)
    rows = torch.tensor([[bos, 1, 2, eos, bos, 3, 0], [bos, 2, eos, bos, eos, bos, 1]])
    targets = rows[:, 1:].clone()
    targets[0, 0] = -100
    score = evaluate(_FixedLogits(), [(rows[:, :-1], targets)], tokenizer, World(0, 1, torch.device("cpu")))
    assert score.text_bytes == 3 + (4 - 1) + 1 + (3 - 1) + (2 - 1)


def test_a_huge_loss_has_a_perplexity():
    assert Score(nats=1e6, tokens=1, text_bytes=1).metrics["val/perplexity"] == math.exp(700)


def test_the_stopwatch_leaves_pauses_out():
    times = iter([0.0, 2.0, 10.0, 12.0, 20.0, 21.0])
    watch = Stopwatch(clock=lambda: next(times))
    for _ in range(2):
        watch.start()
        watch.stop(tokens=100)
    assert watch.lap() == (50.0, 2.0)  # 200 tokens in 4 seconds, 2 seconds a step
    watch.start()
    watch.stop(tokens=100)
    assert watch.lap() == (100.0, 1.0)


def rates(total, **kwargs):
    return [rate_factor(step, total=total, **kwargs) for step in range(total)]


def test_schedules():
    cosine = rates(12, schedule="cosine", warmup=2, final=0.1)
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[-1] == pytest.approx(0.1)
    # Nine updates after the peak; a third of the way is (1 + cos 60°) / 2 = 3/4 of the fall left.
    assert cosine[5] == pytest.approx(0.1 + 0.9 * 0.75)
    wsd = rates(10, schedule="wsd", warmup=2, final=0.0, decay_share=0.4)
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])
    assert rates(3, schedule="constant") == [1.0, 1.0, 1.0]
    assert rates(1, schedule="cosine", final=0.1) == [0.1]
    with pytest.raises(ValueError, match="choose from cosine, wsd, constant"):
        rate_factor(0, total=1, schedule="square")


@pytest.mark.parametrize(
    ("warmup", "total", "updates"),
    [(60, 700, 60), (0.086, 700, 60), (0.086, 50, 4), (0.086, 1, 0), (0.99, 4, 3), (0, 9, 0), (1, 9, 1), (0.5, 0, 0)],
)
def test_a_warmup_is_a_number_of_steps_or_a_share_of_the_run(warmup, total, updates):
    assert warmup_updates(warmup, total) == updates
    assert rates(total, schedule="wsd", warmup=warmup) == rates(total, schedule="wsd", warmup=updates)


def llama():
    return Llama(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, attention="sdpa",
    )  # fmt: skip


@pytest.mark.parametrize("rank", [None, 4])
def test_flops_are_those_that_torch_counts(rank):
    model = llama()
    model.init_weights(0)
    if rank:
        convert_linears(model, rank)
    ids = torch.randint(0, 64, (3, 16))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids, ids).backward()
    assert counter.get_total_flops() == 3 * 16 * flops_per_token(model, seq_len=16)


def test_parameters_are_the_architecture_s_and_trainable_what_gets_gradients():
    dense, model = llama(), llama()
    convert_linears(model, rank=4)
    total = sum(p.numel() for p in dense.parameters())
    assert parameter_counts(dense) == {"parameters": total, "trainable": total}
    # A block: q, o 32×32 and k, v 16×32 train 4 rows of 32; gate and up train 4 columns of 48, down 4 rows of 48.
    rows = 2 * 4 * (4 * 32 + 3 * 48)
    outside = 2 * 64 * 32 + 5 * 32
    assert parameter_counts(model) == {"parameters": total, "trainable": rows + outside}
