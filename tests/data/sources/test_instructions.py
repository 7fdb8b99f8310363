"""Instruction tuning: exactly the tokens of prompts are masked, and the loss is the mean over the responses."""

import json

import pytest
import torch
from torch.nn import functional as F

from data.loading.batches import TrainBatches, validation_batches
from data.prepare import prepare
from data.settings import DataSettings
from data.train_tokenizer import train_tokenizer
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer

PAIRS = [(f"What is {a} + {b}?\nAnswer:", f" {a + b}, é.") for a in range(8) for b in range(1, 9)]


@pytest.fixture(scope="module")
def corpus(root, tmp_path_factory):
    """Settings for a file of pairs and a tokenizer brought along."""
    folder = tmp_path_factory.mktemp("instructions")
    texts = [file.read_text() for file in sorted((root / "models").glob("*.py"))]
    train_tokenizer(texts, folder / "tokenizer.model", 400, seed=0)
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in PAIRS]
    (folder / "pairs.jsonl").write_text("\n\n".join([*lines, '{"prompt": "x", "response": ""}']) + "\n")
    return {
        "name": "pairs", "source": "instructions", "paths": [str(folder / "pairs.jsonl")], "patterns": ["*.jsonl"],
        "tokenizer": str(folder / "tokenizer.model"), "vocab_size": 400, "validation_share": 0.2,
        "root": str(folder / "prepared"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def prepared(corpus):
    return prepare(DataSettings(**corpus))


def rows_of(batches):
    return [row for inputs, targets in batches for row in zip(inputs.tolist(), targets.tolist(), strict=True)]


def test_exactly_the_tokens_of_prompts_and_of_filling_are_no_targets(prepared):
    tokenizer, expected = prepared.tokenizer, {}
    for prompt, response in PAIRS:
        given, learnt = tokenizer.encode(prompt), [*tokenizer.encode(response), tokenizer.eos_id]
        inputs = [tokenizer.bos_id, *given, *learnt[:-1]]
        expected[tuple(inputs)] = [-100] * len(given) + learnt
    length = max(map(len, expected)) + 3
    train = []
    batches = TrainBatches(prepared.train, length, 4, 2, seed=0)
    for step in range(-(-prepared.train.document_count // 4)):
        rows = rows_of(batches.micro_batches(step))
        assert batches.targets(step) == sum(target != -100 for _, targets in rows for target in targets)
        train += rows
    seen = set()
    for inputs, targets in [*train, *rows_of(validation_batches(prepared.val, length, 4))]:
        known = [ids for ids in expected if tuple(inputs[: len(ids)]) == ids and not any(inputs[len(ids) :])]
        if not known:
            assert set(targets) == {-100}  # what fills up the last batch
            continue
        (ids,) = known
        assert targets == expected[ids] + [-100] * (length - len(ids))
        seen.add(ids)
    assert seen == expected.keys()


def test_what_is_too_long_is_cut_and_what_teaches_nothing_is_counted(prepared, caplog):
    caplog.set_level("INFO")
    length = 1 + max(len(prepared.tokenizer.encode(prompt)) for prompt, _ in PAIRS)
    batches = TrainBatches(prepared.train, length, 4, 4, seed=0)
    assert "prompts with responses; train.seq_len=" in caplog.text
    for inputs, targets in batches.micro_batches(0):
        assert inputs.shape == targets.shape == (4, length)
    with pytest.raises(ValueError, match=r"train\.seq_len: no response begins within 3 tokens; raise"):
        TrainBatches(prepared.train, 3, 4, 4, seed=0)


@pytest.mark.parametrize("line", ['{"prompt": "x"}', "[1]", "{", '{"prompt": 1, "response": "y"}'])
def test_a_line_that_is_no_pair_is_refused_by_number(corpus, tmp_path, line):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(
        ValueError, match=r"line 2 of .*bad\.jsonl is not a JSON object with the texts prompt and response"
    ):
        prepare(DataSettings(**{**corpus, "paths": [str(tmp_path)]}))


def overrides(corpus, tmp_path, *more):
    data = [f"data.{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in corpus.items()]
    return [
        "data=instructions", *data, "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
        "model.num_hidden_layers=1", "model.num_attention_heads=2", "optim.rank=8", "optim.warmup_steps=1",
        "train.steps=3", "train.tokens_per_step=512", "train.seq_len=64", "train.eval_every=0", "train.log_every=1",
        "train.compile=false", "train.sample_tokens=0", "logger.wandb.mode=disabled", f"run.root={tmp_path}",
        "train.dtype=float64", *more,
    ]  # fmt: skip


def run(overrides):
    config = load(overrides)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    trainer = Trainer(config, world, ready(config, 1), RunFolder(config), StopRequest())
    trainer.fit()
    lines = [json.loads(line) for line in trainer.folder.metrics_file.read_text().splitlines()]
    return trainer, [line["train/loss"] for line in lines if "train/loss" in line]


def test_the_loss_is_the_mean_over_responses_and_accumulation_changes_nothing(corpus, tmp_path):
    whole, losses = run(overrides(corpus, tmp_path, "run.name=whole"))
    _, accumulated = run(overrides(corpus, tmp_path, "run.name=parts", "train.micro_batch_size=2"))
    assert losses == pytest.approx(accumulated, abs=1e-10)
    fresh = Trainer(
        load(overrides(corpus, tmp_path, "run.name=fresh")), whole.world, whole.feed.data,
        RunFolder(load(overrides(corpus, tmp_path, "run.name=fresh"))), StopRequest(),
    )  # fmt: skip
    ((inputs, targets),) = fresh.feed.micro_batches(0)
    expected = F.cross_entropy(fresh.model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert losses[0] == pytest.approx(expected.item(), abs=1e-10)
