"""Models with more embedding rows than tokens: they train, generate only tokens, and are exported with all rows.

A tokenizer with more tokens than the model has rows is refused in one message.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.tokenizer import MOST_PADDING, Tokenizer
from pretrain import evaluate, generate
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.inference.hf_export import export
from pretrain.inference.pretrained import find_pretrained, load_pretrained
from pretrain.inference.sampling import Sampling, new_tokens, rows_without_token
from pretrain.inference.text_generator import TextGenerator
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import prepare_data, ready
from pretrain.training.trainer import Trainer
from tests.pretrain.inference.hf_models import (
    OVERRIDES,
    TEXTS,
    byte_level,
    change_json,
    llama,
    sentencepiece,
    write_json,
)

ENDS = {"eos_token": "<|end|>", "bos_token": "<|begin|>"}


def with_a_gap(folder):
    """A tokenizer.json with the ids 0 to 299, 301 to 304 for the special tokens, and 350."""
    byte_level(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"zzz": 350}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def with_an_end_of_its_own(folder):
    """As in chat models made from LLaMA 2: the row after those of the sentencepiece model is an end token."""
    sentencepiece(folder)
    write_json(folder / "added_tokens.json", **{"<|im_end|>": 300})
    return {"eos_token_id": [2, 300]}


# The kind of tokenizer, the rows of the model, other settings of it, and the rows without a token.
MODELS = {
    "no padding": (sentencepiece, 300, {}, []),
    "to a multiple of 8": (sentencepiece, 304, {}, range(300, 304)),
    "to a multiple of 64": (sentencepiece, 320, {}, range(300, 320)),
    "to a multiple of 128": (sentencepiece, 384, {}, range(300, 384)),
    "to a power of two": (sentencepiece, 512, {}, range(300, 512)),
    "to a multiple of 1024": (sentencepiece, 1024, {}, range(300, 1024)),
    "far beyond": (sentencepiece, 1500, {}, range(300, 1500)),
    "tied embeddings": (sentencepiece, 320, {"tie_word_embeddings": True}, range(300, 320)),
    "a tokenizer.json": (byte_level, 320, {}, range(304, 320)),
    "a gap in the vocabulary": (with_a_gap, 384, {}, [300, *range(305, 350), *range(351, 384)]),
    "an end that the tokenizer lacks": (with_an_end_of_its_own, 320, {}, range(301, 320)),
    "special tokens beyond the rows": (lambda f: byte_level(f, 300, ["<|begin|>", "<|end|>", "<pad>"]), 302, {}, []),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def padded(request, tmp_path):
    """The folder of a model, the number of its rows, and the rows without a token, which are the likeliest ones."""
    kind, rows, settings, empty = request.param
    (folder := tmp_path / "hf").mkdir()
    changes = kind(folder)
    model = llama(folder, rows, **settings, **(changes if isinstance(changes, dict) else {}))
    if not settings.get("tie_word_embeddings"):
        with torch.no_grad():
            model.lm_head.weight[list(empty)] *= 9
        model.save_pretrained(folder)
    if (folder / "tokenizer.json").exists():
        write_json(folder / "tokenizer_config.json", **ENDS)
    return folder, rows, list(empty)


def overrides(tmp_path, folder, *more):
    (tmp_path / "corpus").mkdir(exist_ok=True)
    for number, text in enumerate(TEXTS):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    tokenizer = next(path for path in (folder / "tokenizer.model", folder / "tokenizer.json") if path.exists())
    return [
        "data=text", f"data.paths=[{tmp_path / 'corpus'}]", f"data.root={tmp_path / 'prepared'}",
        f"run.root={tmp_path}", *OVERRIDES, "model.max_position_embeddings=128", "model.initializer_range=0.2",
        "optim.rank=8", "optim.warmup_steps=1", "train.seq_len=32", "train.tokens_per_step=128", "train.steps=2",
        "train.eval_every=0", "train.eval_sequences=2", "train.log_every=1", "train.sample_tokens=8",
        "train.compile=false", "logger.wandb.mode=disabled", "run.name=run", f"train.init_from={folder}",
        f"data.tokenizer={tokenizer}", *more,
    ]  # fmt: skip


def train(config):
    folder = RunFolder(config)
    with folder.locked():
        Trainer(config, World(0, 1, torch.device("cpu")), ready(config, 1), folder, StopRequest()).fit()
    return folder.path


def test_rows_without_a_token_are_never_drawn(padded, monkeypatch):
    folder, rows, empty = padded
    found = find_pretrained(folder)
    model, tokenizer = found.load()
    never = rows_without_token(tokenizer, rows, [tokenizer.eos_id, *found.end_ids()])
    assert never.nonzero().flatten().tolist() == empty
    drawn = []

    def spied(*arguments):
        for token in new_tokens(*arguments):
            drawn.append(token)
            yield token

    monkeypatch.setattr("pretrain.inference.text_generator.new_tokens", spied)
    generator = TextGenerator(model, tokenizer, found.end_ids())
    for sampling in (*(Sampling(100.0, top_k=0, seed=seed) for seed in range(4)), Sampling(temperature=0), Sampling()):
        assert all(isinstance(piece, str) for piece in generator.stream("alpha", 60, sampling))
    assert len(set(drawn)) > 50 and not set(drawn) & set(empty) and max(drawn) < rows


def test_an_export_has_the_rows_as_they_came(padded, tmp_path):
    folder, rows, _ = padded
    export(folder, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == rows


def test_a_run_starts_from_it_whether_or_not_the_tokens_are_counted(padded, tmp_path):
    folder, rows, _ = padded
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    shape = [f"model.vocab_size={rows}", f"model.tie_word_embeddings={tied}"]
    common = overrides(tmp_path, folder, *shape)
    tokens = Tokenizer(folder / find_pretrained(folder).tokenizer().name).vocab_size
    check(load([*common, f"data.vocab_size={min(rows, tokens)}"]))
    if rows - tokens <= MOST_PADDING:
        check(load(common))


@pytest.mark.parametrize("name", ["to a multiple of 64", "a tokenizer.json", "a gap in the vocabulary"])
def test_it_trains_samples_and_goes_out_with_all_its_rows(name, tmp_path, capsys):
    kind, rows, _, empty = MODELS[name]
    (folder := tmp_path / "hf").mkdir()
    kind(folder)
    llama(folder, rows)
    if (folder / "tokenizer.json").exists():
        write_json(folder / "tokenizer_config.json", **ENDS)
    run = train(load(overrides(tmp_path, folder, f"model.vocab_size={rows}")))
    assert (run / "samples.md").read_text().count("Prompt: ") == 3
    export(run, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    untouched = "model.embed_tokens.weight"  # the rows of no token are in no batch
    assert torch.equal(before[untouched][list(empty)], after[untouched][list(empty)])
    assert after["lm_head.weight"].shape[0] == rows
    evaluate.main([str(run), "--text", str(tmp_path / "corpus"), "--json"])
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    generate.main([str(run), "--prompt", "alpha", "--tokens", "60", "--temperature", "100", "--top-k", "0"])
    assert "alpha" in capsys.readouterr().out


# The kind of tokenizer, with more ordinary tokens than the model has rows, or with an end beyond them.
TOO_MANY = {
    "one more": (lambda folder: sentencepiece(folder, 301), 300),
    "many more": (lambda folder: sentencepiece(folder, 400), 320),
    "a tokenizer.json": (lambda folder: byte_level(folder, 310), 304),
    "its end is beyond the rows": (byte_level, 301),
}


@pytest.mark.parametrize(("kind", "rows"), TOO_MANY.values(), ids=TOO_MANY)
def test_a_tokenizer_with_more_tokens_than_rows_is_refused_in_one_message(kind, rows, tmp_path, capsys):
    (folder := tmp_path / "hf").mkdir()
    kind(folder)
    llama(folder, rows)
    write_json(folder / "tokenizer_config.json", **ENDS)
    with pytest.raises(ValueError, match=rf"tokens, but the model has {rows} embedding rows; use the tokenizer"):
        load_pretrained(folder)
    with pytest.raises(ConfigError) as error:
        check(load(overrides(tmp_path, folder, f"model.vocab_size={rows}")))
    assert len(str(error.value).splitlines()) == 1
    assert f"has {rows} embedding rows, but data.tokenizer={folder}" in str(error.value)
    with pytest.raises(SystemExit):
        generate.main([str(folder)])
    assert "embedding rows" in capsys.readouterr().err
    assert not (tmp_path / "prepared").exists()


def test_another_number_of_rows_is_one_message_with_the_number(tmp_path):
    (folder := tmp_path / "hf").mkdir()
    sentencepiece(folder)
    llama(folder, 320)
    with pytest.raises(ConfigError) as error:
        check(load(overrides(tmp_path, folder, "model.vocab_size=300")))
    assert str(error.value) == f"train.init_from={folder} is a model of another shape; set model.vocab_size=320"
    check(load(overrides(tmp_path, folder, "model.vocab_size=320")))


def test_weights_of_other_rows_than_the_config_says_are_refused_before_anything_is_read(tmp_path):
    (folder := tmp_path / "hf").mkdir()
    sentencepiece(folder)
    llama(folder, 320)
    change_json(folder / "config.json", vocab_size=300)
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is \(320, 32\) there and \(300, 32\) in the model"):
        check(load(overrides(tmp_path, folder, "model.vocab_size=300")))


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_a_new_tokenizer_for_a_model_that_has_one_is_refused_before_the_data_are_prepared(on_the_fly, tmp_path):
    (folder := tmp_path / "hf").mkdir()
    sentencepiece(folder)
    llama(folder, 320)
    unnamed = overrides(tmp_path, folder, "model.vocab_size=320", f"data.on_the_fly={on_the_fly}")
    unnamed = [override for override in unnamed if not override.startswith("data.tokenizer")]
    with pytest.raises(ValueError, match=r"another tokenizer than the run; set data\.tokenizer=.*tokenizer\.model"):
        prepare_data(load(unnamed), 1)
    assert not (tmp_path / "prepared").exists()
