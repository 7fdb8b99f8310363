"""A tokenizer.json is held to the library's own encoding; its special tokens are named or refused; one is trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from data.prepare import prepare, problems
from data.settings import DataSettings
from data.token_dataset import load
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load as load_config
from pretrain.distributed.world import World
from pretrain.inference.hf_export import export
from pretrain.inference.pretrained import load_pretrained
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer

REPO = Path(__file__).resolve().parents[2]
SPECIAL = ["<|begin|>", "<|end|>"]
TEXT = "  def f(x):\n    return 'é日 <|end|> \U0001f600'\t\r\n"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [file.read_text() for file in sorted((REPO / "models").glob("*.py"))]


@pytest.fixture(scope="module")
def theirs(texts):
    """A byte-level tokenizer as GPT-2's and Llama 3's are, trained by the library."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


@pytest.fixture
def file(theirs, tmp_path) -> Path:
    theirs.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokens_are_the_librarys_and_texts_come_back(file, theirs, texts):
    ours = Tokenizer(file, bos=SPECIAL[0], eos=SPECIAL[1])
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (600, 0, 1)
    for text in [*texts, "", " "]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode([ours.bos_id, *ids, ours.eos_id]) == text
        assert ours.token_bytes[ids].sum() == len(text.encode())
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == [ours.encode(text) for text in texts]


def test_a_text_that_spells_a_special_token_is_text(file):
    ours = Tokenizer(file, bos=SPECIAL[0], eos=SPECIAL[1])
    assert not {0, 1} & set(ours.encode(TEXT)) and ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.token_bytes[[0, 1]].tolist() == [0, 0]


def test_special_tokens_are_read_beside_the_file_or_refused_by_name(file):
    with pytest.raises(ValueError, match=r"tokenizer\.json has no eos token; set data\.eos"):
        Tokenizer(file)
    with pytest.raises(ValueError, match=r"data\.bos: .* has no token <s>; name one that it has"):
        Tokenizer(file, bos="<s>", eos=SPECIAL[1])
    own = DataSettings(source="text", paths=[str(REPO / "models")], tokenizer=str(file), vocab_size=600)
    assert problems(own) == [f"data.tokenizer: {file} has no eos token; set data.eos to the token that ends a text"]
    beside = {"bos_token": {"content": SPECIAL[0]}, "eos_token": SPECIAL[1], "pad_token": None}
    file.with_name("tokenizer_config.json").write_text(json.dumps(beside))
    assert (Tokenizer(file).bos_id, Tokenizer(file).eos_id) == (0, 1)
    assert Tokenizer(file, bos=SPECIAL[1]).bos_id == 1
    file.with_name("tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer(file)


def test_a_preparation_keeps_it_with_its_special_tokens(file, tmp_path, texts):
    own = DataSettings(
        name="own", source="text", paths=[str(REPO / "models")], tokenizer=str(file), vocab_size=600, eos=SPECIAL[1],
        validation_share=0.2, root=str(tmp_path / "prepared"),
    )  # fmt: skip
    prepared = prepare(own)
    assert prepared.tokenizer.path == prepared.folder / "tokenizer.json"
    assert (prepared.tokenizer.bos_id, prepared.tokenizer.eos_id) == (1, 1)  # without a bos, a text begins with eos
    assert prepared.tokenizer.sha256 == Tokenizer(file, eos=SPECIAL[1]).sha256
    decoded = {prepared.tokenizer.decode(prepared.train.document(i)) for i in range(prepared.train.document_count)}
    assert decoded < set(texts)
    (prepared.folder / "tokenizer.json").write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not the tokenizer that these shards were made with"):
        load(prepared.folder)


def test_sentencepieces_special_tokens_can_be_named_too(texts, tmp_path):
    train_tokenizer(texts, tmp_path / "t.model", 400, seed=0)
    plain, named = Tokenizer(tmp_path / "t.model"), Tokenizer(tmp_path / "t.model", bos="</s>", eos="<s>")
    assert (named.bos_id, named.eos_id) == (plain.eos_id, plain.bos_id)
    with pytest.raises(ValueError, match=r"data\.eos: .* has no token <none>"):
        Tokenizer(tmp_path / "t.model", eos="<none>")
    (tmp_path / "copy").mkdir()
    copy = Tokenizer(named.copy_to(tmp_path / "copy"))
    assert (copy.bos_id, copy.eos_id, copy.sha256) == (named.bos_id, named.eos_id, plain.sha256)


def command(*flags: str) -> subprocess.CompletedProcess:
    full = [sys.executable, "-m", "data.train_tokenizer", *flags]
    return subprocess.run(full, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_the_command_trains_one_and_says_what_is_wrong(tmp_path, texts):
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    flags = ["--paths", str(tmp_path), "--patterns", "*.txt", "--vocab-size", "500", "--out"]
    run = command(*flags, str(tmp_path / "a.model"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{tmp_path / 'a.model'}: 500 pieces")
    same = train_tokenizer(texts, tmp_path / "b.model", 500, seed=0)
    assert Tokenizer(tmp_path / "a.model").sha256 == same.sha256
    run = command(*flags, str(tmp_path / "c.model"), "--coverage", "1.0", "--sample-bytes", "20000")
    assert run.returncode == 0 and Tokenizer(tmp_path / "c.model").sha256 != same.sha256
    run = command(*flags, str(tmp_path / "d.model"), "--coverage", "7")
    assert run.returncode == 2 and run.stderr.startswith("--coverage: 7.0 must be")
    run = command(*flags, str(tmp_path / "d.model"), "--sample-bytes", "0")
    assert run.returncode == 2 and run.stderr == "--sample-bytes: 0 must be at least 1\n"
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)


def test_a_run_on_a_mixture_keeps_it_and_is_exported_with_it(file, tmp_path, texts):
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, text in enumerate(texts * 2):
        folder = folders[number % 2]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(text + str(number))
    corpora = ",".join(f"{{weight: {weight}, paths: ['{folder}']}}" for weight, folder in enumerate(folders, start=1))
    config = load_config([
        "data=mixture", f"data.mixture=[{corpora}]", f"data.tokenizer={file}", f"data.eos='{SPECIAL[1]}'",
        f"data.bos='{SPECIAL[0]}'", "data.validation_share=0.3", f"data.root={tmp_path / 'prepared'}",
        "model.vocab_size=600", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1",
        "model.num_attention_heads=2", "optim.rank=8", "optim.warmup_steps=1", "train.steps=3", "train.seq_len=64",
        "train.tokens_per_step=512", "train.eval_every=0", "train.log_every=1", "train.compile=false",
        "train.sample_tokens=8", "logger.wandb.mode=disabled", f"run.root={tmp_path / 'runs'}", "run.name=one",
        "train.document_masks=true",
    ])  # fmt: skip
    world = World(rank=0, size=1, device=torch.device("cpu"))
    Trainer(config, world, ready(config, 1), RunFolder(config), StopRequest()).fit()
    run, out = tmp_path / "runs" / "one", tmp_path / "out"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["perf/data_s"] < 5 for line in lines if "train/loss" in line)
    _, tokenizer = load_pretrained(run)
    assert (tokenizer.path.name, tokenizer.bos_id, tokenizer.eos_id) == ("tokenizer.json", 0, 1)
    export(run, out)
    theirs = AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token, theirs.eos_token) == tuple(SPECIAL)
    assert theirs(texts[0], add_special_tokens=False)["input_ids"] == tokenizer.encode(texts[0])
