"""A packed document has the loss and the gradient that it has unpacked."""

import numpy as np
import pytest
import torch

from data.loading.batches import IGNORED, TrainBatches, validation_batches
from data.shards.reader import Shard, Tokens, token_dtype
from data.shards.writer import ShardWriter
from models import llama
from models.attention import document_layout
from models.flash_kernels import FLASH
from models.llama import Llama
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.setup.checks import check
from tests.models.flash_attention import install

BOS, EOS, VOCAB, SEQ_LEN = 1, 2, 50, 24
LENGTHS = [5, 2, 30, 7, 24, 3, 11, 90, 4, 6, 2, 2, 40, 9]


@pytest.fixture
def tokens(tmp_path) -> Tokens:
    """Documents of these lengths between bos and eos, in two shards."""
    draw = np.random.default_rng(0)
    for shard, lengths in (("a", LENGTHS[:6]), ("b", LENGTHS[6:])):
        with ShardWriter(tmp_path, shard, token_dtype(VOCAB)) as writer:
            for number, length in enumerate(lengths):
                ids = np.array([BOS, *draw.integers(3, VOCAB, length - 2), EOS])
                writer.add(f"{shard}{number}", ids, text_bytes=length)
    dtype = token_dtype(VOCAB)
    return Tokens([Shard(tmp_path, name, dtype) for name in ("a", "b")], dtype)


def train(tokens, **more):
    return TrainBatches(tokens, SEQ_LEN, 4, 2, seed=0, **more)


def test_documents_begin_at_their_bos_and_no_bos_is_a_target(tokens):
    masked, plain = train(tokens, masks=True), train(tokens)
    for step in range(6):
        targets_seen = 0
        for (inputs, targets, documents), (plain_inputs, plain_targets) in zip(
            masked.micro_batches(step), plain.micro_batches(step), strict=True
        ):
            assert torch.equal(inputs, plain_inputs) and documents.dtype == torch.int32
            begins = inputs == BOS
            begins[:, 0] = True
            assert documents.tolist() == [*begins.flatten().nonzero().flatten().tolist(), inputs.numel()]
            assert torch.equal(targets, plain_targets.masked_fill(plain_targets == BOS, IGNORED))
            targets_seen += int((targets != IGNORED).sum())
        whole = train(tokens, masks=True)
        assert whole.targets(step) == sum(int((t != IGNORED).sum()) for _, t, _ in whole.micro_batches(step))
        assert targets_seen == whole.targets(step) < plain.targets(step)


def test_validation_with_masks_scores_every_token_but_those_that_begin_a_document(tokens):
    scored = []
    for inputs, targets, documents in validation_batches(tokens, SEQ_LEN, 3, masks=True):
        assert inputs.shape == targets.shape and set(range(0, 3 * SEQ_LEN + 1, SEQ_LEN)) <= set(documents.tolist())
        scored += targets[targets != IGNORED].tolist()
    everything = tokens[1 : len(tokens)]
    assert sorted(scored) == sorted(everything[everything != BOS].tolist())


@pytest.fixture
def model():
    made = Llama(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    ).double()  # fmt: skip
    made.init_weights(seed=0)
    return made


def numbered(documents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The number of every token's document, by hand."""
    lengths = documents.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths).view(shape)


@pytest.mark.parametrize("backend", ["sdpa", *FLASH])
def test_a_packed_document_gets_the_loss_of_an_unpacked_one(tokens, model, backend, monkeypatch):
    install(monkeypatch, *FLASH)
    packed, apart = [], []
    for inputs, targets, documents in train(tokens, masks=True).micro_batches(0):
        monkeypatch.setattr(llama, "resolve_backend", lambda *_: backend)
        packed.append(model(inputs, targets, documents))
        monkeypatch.setattr(llama, "resolve_backend", lambda *_: "sdpa")
        numbers = numbered(documents, inputs.shape)
        for row in range(len(inputs)):
            for number in numbers[row].unique():
                own = numbers[row] == number
                apart.append(model(inputs[row, own][None], targets[row, own][None]))
        assert abs(model(inputs, targets) - packed[-1]) > 1e-3  # without masks they see each other
    assert len(apart) > 6
    torch.testing.assert_close(sum(packed), sum(apart), rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(sum(losses), list(model.parameters())) for losses in (packed, apart)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_mask_of_sdpa_has_the_same_entries_as_one_of_numbered_tokens(tokens):
    for inputs, _, documents in train(tokens, masks=True).micro_batches(3):
        numbers = numbered(documents, inputs.shape)
        expected = (numbers[:, :, None] == numbers[:, None, :]).tril().unsqueeze(1)
        assert torch.equal(document_layout(documents, "sdpa", *inputs.shape), expected)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_and_compiling_change_nothing(tokens, model, mode):
    batch = next(train(tokens, masks=True).micro_batches(0))
    expected = model(*batch)
    for layer in model.layers:
        layer.checkpointing = mode
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(*batch), expected, rtol=1e-12, atol=0)


def test_masks_for_rows_of_one_document_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.document_masks=true: each row of data=instructions is already"):
        check(load(["data=instructions", "train.document_masks=true", f"data.paths=[{tmp_path}]"]))
