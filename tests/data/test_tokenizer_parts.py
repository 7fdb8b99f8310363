"""A text that goes through a tokenizer in parts stays the text, byte for byte; a text that it changes is counted."""

import io
import json
import logging
import random

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.prepare import prepare
from data.settings import DataSettings
from data.tokenizer import Tokenizer

TRAINING = ["the river runs  to the stone\n", "alpha beta gamma, delta.\n\tA:", "Q: 1 + 2 ="] * 40
TEXTS = [
    "", " ", "  ", "x", " x", "x ", "  two  spaces  ", "\n", "\n\nx\n", "\tx\r\n", "▁", "x▁y", "▁x", "x▁", "▁ x",
    "x ▁ y", "▁▁", " ▁", "a\u2581\n\u2581b", "é 日 \U0001f600", "the river", "<s> </s> <0x41>",
    "\u00a0x\u3000", "\0", "ﬁ Å",
]  # fmt: skip
PAIRS = [
    ("Q: 1 + 1?\nA:", "2\nok"), ("A:", " 2"), ("A: ", "2"), ("A:  ", "  2"), ("x", "y"), ("", "the river"),
    ("", " the"), ("▁", "▁"), ("x▁", "y▁z"), ("the river ", "runs"), ("line\n", "\tline"), ("é", "日"),
    ("x", "\n"), ("\n", " x"), ("x", " "), ("the riv", "er runs"),
]  # fmt: skip


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    usual = dict(model_type="bpe", vocab_size=330, byte_fallback=True, normalization_rule_name="identity")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_writer=model, minloglevel=2,
        **{**usual, "remove_extra_whitespaces": False, **options},
    )  # fmt: skip
    return model.getvalue()


def huggingface(normalizer=None, pre_tokenizer=None, decoder=None, model=None, byte_fallback=False) -> bytes:
    """A tokenizer.json; with `byte_fallback`, the pieces <0x00> to <0xFF> come first, as LLaMA's do."""
    made = tokenizers.Tokenizer(model or models.BPE())
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, pre_tokenizer, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in str(pre_tokenizer) else []
    kind = trainers.WordPieceTrainer if model else trainers.BpeTrainer
    special = ["<unk>", "<s>", "</s>"]
    trainer = kind(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TRAINING, trainer)
    spec = json.loads(made.to_str())
    if byte_fallback:
        pieces = [piece for piece, _ in sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])]
        pieces[3:3] = [f"<0x{byte:02X}>" for byte in range(256)]
        spec["model"] |= {"vocab": {piece: number for number, piece in enumerate(pieces)}, "byte_fallback": True}
    return json.dumps(spec).encode()


def llama_decoder(*more):
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def metaspace(scheme: str) -> dict:
    step = {"prepend_scheme": scheme, "replacement": "▁"}
    return {"pre_tokenizer": pre_tokenizers.Metaspace(**step), "decoder": decoders.Metaspace(**step)}


def old_metaspace() -> bytes:
    """As it was written before there was a prepend_scheme."""
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    return json.dumps(json.loads(huggingface(**metaspace("always"))) | {"pre_tokenizer": old, "decoder": old}).encode()


LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
EXACT = {
    "ours": lambda: sentencepiece_model(add_dummy_prefix=False, user_defined_symbols=["\n", "▁▁▁▁"]),
    "llama 2": lambda: sentencepiece_model(),
    "llama 2, unigram": lambda: sentencepiece_model(model_type="unigram", vocab_size=290),
    "llama 2 as json": lambda: huggingface(
        LLAMA_NORMALIZER, decoder=llama_decoder(decoders.Strip(" ", 1, 0)), byte_fallback=True
    ),
    "gemma as json": lambda: huggingface(
        normalizers.Replace(" ", "▁"), decoder=llama_decoder(), byte_fallback=True
    ),
    "llama 3": lambda: huggingface(
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(r"\s+|[^\s\w]+|\w{1,3}"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoders.ByteLevel(),
    ),
    "gpt-2": lambda: huggingface(None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
}  # fmt: skip
INEXACT = {
    "gpt-2 with a space before": lambda: huggingface(
        None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    ),
    "t5": lambda: sentencepiece_model(
        model_type="unigram", byte_fallback=False, vocab_size=35, normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    ),
    "mistral's first": lambda: sentencepiece_model(normalization_rule_name="nmt_nfkc"),
    "without extra spaces": lambda: sentencepiece_model(remove_extra_whitespaces=True),
    "space after": lambda: sentencepiece_model(treat_whitespace_as_suffix=True),
    "metaspace, first": lambda: huggingface(**metaspace("first")),
    "metaspace, always": lambda: huggingface(**metaspace("always")),
    "metaspace, old": lambda: old_metaspace(),
    "bert": lambda: huggingface(
        normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
        models.WordPiece(unk_token="<unk>"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}

    def opened(name: str) -> Tokenizer:
        if name not in made:
            path = folder / str(len(made)) / "tokenizer"
            path.parent.mkdir()
            path.write_bytes({**EXACT, **INEXACT}[name]())
            made[name] = Tokenizer(path, eos="</s>")
        return made[name]

    return opened


def is_kept(tokenizer: Tokenizer, text: str) -> bool:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.is_kept(text, ids) == (tokenizer.decode(ids) == text)
    return tokenizer.is_kept(text, ids)


@pytest.mark.parametrize("name", EXACT)
def test_every_text_comes_back(opened, name):
    tokenizer, draw = opened(name), random.Random(0)
    compared = ["llama 2 as json", "gemma as json"]  # it is not known of them beforehand
    assert tokenizer._model.is_exact == (name not in compared)
    random_texts = ["".join(draw.choices(" \n▁xé\u00a0日\U0001f600\0", k=draw.randrange(12))) for _ in range(300)]
    for text in [*TEXTS, *random_texts]:
        assert is_kept(tokenizer, text), text


@pytest.mark.parametrize("name", EXACT)
def test_pairs_are_the_two_texts_and_nothing_between_them(opened, name):
    tokenizer = opened(name)
    given, learnt = tokenizer.encode_pairs(*zip(*PAIRS, strict=True))
    for (prompt, response), before, after in zip(PAIRS, given, learnt, strict=True):
        assert before.tolist() == tokenizer.encode(prompt)
        assert tokenizer.decode([tokenizer.bos_id, *before, *after, tokenizer.eos_id]) == prompt + response
        if prompt:
            assert tokenizer.token_bytes[after].sum() == len(response.encode())


@pytest.mark.parametrize("name", EXACT)
def test_the_bytes_of_a_text_are_its_own(opened, name):
    tokenizer = opened(name)
    for text in TEXTS:
        if text and not text.startswith("▁"):
            added = tokenizer.space_after is not None
            assert tokenizer.token_bytes[tokenizer.encode(text)].sum() - added == len(text.encode()), text
    assert tokenizer.space_after == (tokenizer.bos_id if name.startswith("llama 2") else None)


@pytest.mark.parametrize("name", ["metaspace, first", "metaspace, always", "metaspace, old", "without extra spaces"])
def test_a_response_gets_no_space_from_tokenizers_that_change_other_texts(opened, name):
    tokenizer = opened(name)
    for prompt, response in [("the river", "runs"), ("A:", " the"), ("to the", " stone")]:
        (before,), (after,) = tokenizer.encode_pairs([prompt], [response])
        assert tokenizer.decode([*before, *after]) == prompt + response


@pytest.mark.parametrize("name", INEXACT)
def test_a_text_that_is_changed_is_told_from_one_that_is_kept(opened, name):
    kept = {is_kept(opened(name), text) for text in [*TEXTS, "the river", "alpha beta"]}
    assert kept == {False, True}


def test_only_tokenizers_that_gave_other_tokens_before_are_told_apart(opened):
    """The tokens of the others, ours among them, are what they were, and so is what identifies a preparation."""
    assert [name for name in EXACT if opened(name).encoding == 1] == ["ours", "llama 3", "gpt-2"]
    assert {opened(name).encoding for name in ("llama 2", "t5", "without extra spaces", "metaspace, first")} == {2}


def prepared(opened, name, tmp_path, source, lines):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = opened(name)
    return prepare(
        DataSettings(
            source=source, paths=[str(tmp_path / "a.jsonl")], tokenizer=str(tokenizer.path), eos="</s>",
            vocab_size=tokenizer.vocab_size, root=str(tmp_path / "prepared"),
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_instructions_are_prepared_as_they_were_written(opened, name, tmp_path):
    lines = [{"prompt": prompt, "response": response} for prompt, response in PAIRS]
    found = prepared(opened, name, tmp_path, "instructions", lines)
    texts = [
        found.tokenizer.decode(split.document(number))
        for split in (found.train, found.val)
        for number in range(split.document_count)
    ]
    assert sorted(texts) == sorted(prompt + response for prompt, response in PAIRS)
    assert "changed" not in found.manifest["corpus"]


def test_documents_that_are_changed_are_counted_in_the_log_and_the_manifest(opened, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    lines = [{"text": text} for text in ["the river", "runs  to", "the stone ", "alpha beta"]]
    found = prepared(opened, "t5", tmp_path, "records", lines)
    assert found.manifest["corpus"]["changed"] == 2
    assert "the tokenizer changes 2 of 4 documents: the tokens decode to another text" in caplog.text
