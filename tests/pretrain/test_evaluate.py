"""Evaluation compared with Hugging Face's loss on the same windows, and the output of the command."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer
from pretrain import evaluate
from pretrain.training.validation import tokenize_files

TEXT = "def main():\n    return 'é' + name  # the end\n" * 30


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """A Hugging Face LLaMA with a tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("model")
    texts = [file.read_text() for file in sorted((root / "models").glob("*.py"))]
    train_tokenizer(texts, folder / "tokenizer.model", 400, seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=32, initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def printed(folder, capsys, *arguments):
    evaluate.main([str(folder), "--text", str(folder / "text.txt"), "--batch-size", "4", *arguments])
    return capsys.readouterr().out


@torch.no_grad()
def test_the_command_prints_hugging_face_s_loss_of_every_token(folder, capsys):
    score = json.loads(printed(folder, capsys, "--json"))
    tokenizer = Tokenizer(folder / "tokenizer.model")
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id])
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    windows = [(ids[i : i + 32], ids[i + 1 : i + 33]) for i in range(0, len(ids) - 1, 32)]
    nats = []
    for i in range(0, len(windows), 4):
        rows = [model(x[: len(y)][None]).logits[0].log_softmax(-1).gather(1, y[:, None]) for x, y in windows[i : i + 4]]
        nats += [-row.sum().item() for row in rows]
    assert score["tokens"] == len(ids) - 1 and score["bytes"] == len(TEXT.encode()) and score["seq_len"] == 32
    assert score["loss"] == pytest.approx(sum(nats) / (len(ids) - 1), abs=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert score["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / len(TEXT.encode()), abs=1e-5)
    assert printed(folder, capsys).splitlines() == [
        f"{score['tokens']:,} tokens of {score['bytes']:,} bytes, 32 at a time",
        f"loss           {score['loss']:.4f} nats per token",
        f"perplexity     {score['perplexity']:.3f}",
        f"bits per byte  {score['bits_per_byte']:.4f}",
    ]


def test_windows_can_be_shorter_and_documents_are_framed_as_in_a_preparation(folder, capsys):
    assert json.loads(printed(folder, capsys, "--json", "--seq-len", "8"))["seq_len"] == 8
    tokenizer = Tokenizer(folder / "tokenizer.model")
    (folder / "two").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "two" / name).write_text("x = 1\n")
    tokens = tokenize_files([str(folder / "two")], ["*.txt"], tokenizer)
    assert np.array_equal(tokens, [tokenizer.bos_id, *tokenizer.encode("x = 1\n"), tokenizer.eos_id] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--text", "x"], "nowhere contains no model; name a run's folder"),
        (["MODEL", "--text", "nowhere.txt"], "--text: there is no file or folder nowhere.txt"),
        (["MODEL", "--text", __file__, "--seq-len", "9999"], "--seq-len=9999 is more than the "),
        (["MODEL", "--data", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_missing_files_are_named_without_a_traceback(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(folder) if word == "MODEL" else word for word in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
