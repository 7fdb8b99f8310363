"""Sampling against Hugging Face's, the cache against the full forward, a stream against its text."""

from itertools import islice

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from data.train_tokenizer import train_tokenizer
from models.kv_cache import KVCache
from models.llama import Llama
from pretrain import generate as command
from pretrain.inference.sampling import Sampling, generate, new_tokens
from pretrain.inference.text_generator import TextGenerator

SIZES = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 24, "initializer_range": 0.2,
}  # fmt: skip
PROMPT = [1, 17, 230, 5, 99]


def small(kv_heads):
    model = Llama(**SIZES, num_key_value_heads=kv_heads).eval()
    model.init_weights(0)
    return model


@pytest.fixture(scope="module")
def model():
    return small(kv_heads=2)


@pytest.fixture(scope="module")
def tokenizer(root, tmp_path_factory):
    texts = [file.read_text() for file in sorted((root / "models").glob("*.py"))]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", SIZES["vocab_size"], seed=0)


@pytest.fixture
def generator(model, tokenizer):
    return TextGenerator(model, tokenizer)


@pytest.mark.parametrize("kv_heads", [6, 2])
@torch.no_grad()
def test_logits_from_a_cache_equal_the_full_forward_however_the_tokens_come(kv_heads):
    model = small(kv_heads)
    ids = torch.randint(SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
    whole = model(ids)
    caches = [KVCache(24) for _ in model.layers]
    parts = [model(part, caches=caches) for part in ids.split([7, 1, 1, 10, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)
    assert whole.std() > 1 and [cache.tokens for cache in caches] == [24] * 2


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(), Sampling(temperature=1.3, top_k=0, top_p=0.9, seed=3)],
    ids=["greedy", "top-k", "top-p"],
)
def test_tokens_from_a_cache_are_those_of_the_full_forward_also_beyond_the_positions(model, sampling):
    cached, full = (list(islice(new_tokens(model, PROMPT, sampling, use_cache=use), 36)) for use in (True, False))
    assert cached == full
    assert len(set(full)) > 3  # not one token over and over


def test_draws_are_a_function_of_the_seed(model):
    texts = [tuple(islice(new_tokens(model, PROMPT, Sampling(seed=seed)), 30)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 10, 1), (1.5, 0, 0.6), (1, 20, 0.8), (1, 1, 0.1)])
def test_probabilities_are_hugging_face_s(temperature, top_k, top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    theirs = TemperatureLogitsWarper(float(temperature))(None, logits[None].clone())
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    theirs = TopPLogitsWarper(top_p)(None, theirs).softmax(-1)[0]
    p, tokens = Sampling(temperature, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(torch.zeros(50).index_put((tokens,), p), theirs)


def test_the_command_s_defaults_are_the_library_s():
    args = command.parser().parse_args(["model"])
    assert Sampling(args.temperature, args.top_k, args.top_p, args.seed or 0) == Sampling()


def test_values_out_of_range_are_refused_at_once():
    with pytest.raises(ValueError, match=r"temperature=-1 must be at least 0\ntop_k=-2 .*\ntop_p=0 must be above 0"):
        Sampling(-1, -2, 0)


def test_the_pieces_of_a_stream_make_up_the_text_and_hold_no_half_characters(generator, tokenizer):
    prompt = "def forward(é"
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    whole = generate(generator.model, ids, 60, temperature=1.5, top_k=0, seed=5, ends=[tokenizer.eos_id])
    pieces = list(generator.stream(prompt, 60, Sampling(1.5, top_k=0, seed=5)))
    assert prompt + "".join(pieces) == tokenizer.decode(whole)
    assert len(pieces) > 10 and any(len(text.encode()) > len(text) for text in pieces)
    assert all("\ufffd" not in text[-1:] for text in pieces[:-1])
    made = min(60, len(whole) - len(ids) + 1)  # an end is generated too, but no text
    assert generator.tokens == made and f"{made} tokens" in generator.speed


def test_a_stop_cuts_the_text_before_it_and_none_of_it_is_shown(generator):
    sampling = Sampling(seed=4)
    text = "".join(generator.stream("self", 60, sampling))
    stop = text[30:36]
    pieces = list(generator.stream("self", 60, sampling, ["never", stop]))
    assert "".join(pieces) == text[: text.index(stop)]
    assert generator.tokens < 60


def test_a_stop_is_held_back_also_while_one_of_its_characters_comes_in_bytes(generator, tokenizer, monkeypatch):
    ids = tokenizer.encode("1ş.")
    assert len(ids) > 3  # ş has no piece of its own
    monkeypatch.setattr("pretrain.inference.text_generator.new_tokens", lambda *_: iter(ids))
    assert "".join(generator.stream("self", len(ids), Sampling(), ["1ş."])) == ""
    assert "".join(generator.stream("self", len(ids), Sampling(), ["1ş!"])) == "1ş."


def test_the_end_token_ends_the_text(model):
    ids = list(islice(new_tokens(model, PROMPT, Sampling(seed=1)), 20))
    ended = generate(model, PROMPT, 20, temperature=0.8, top_k=50, seed=1, ends=[99999, ids[7]])
    assert ended == [*PROMPT, *ids[: ids.index(ids[7])]]
