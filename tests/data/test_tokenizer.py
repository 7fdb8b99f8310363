"""The tokenizer gives every text back, is the same on every training, and says what cannot be."""

import io
import random

import numpy as np
import pytest
import sentencepiece

from data.sources.files import stdlib_files
from data.sources.records import read_documents
from data.tokenizer import Tokenizer
from data.train_tokenizer import _sample, train_tokenizer

VOCAB_SIZE = 1024


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in read_documents(stdlib_files(1_000_000), {})]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory) -> Tokenizer:
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", VOCAB_SIZE, seed=0)


def test_every_file_of_the_standard_library_comes_back_exactly_and_its_bytes_are_counted(tokenizer):
    documents = list(read_documents(stdlib_files(10**9), {}))
    assert len(documents) > 500
    for start in range(0, len(documents), 64):
        batch = documents[start : start + 64]
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for (name, text, _), ids in zip(batch, encoded, strict=True):
            assert tokenizer.decode(ids) == text, name
            assert tokenizer.token_bytes[ids].sum() == len(text.encode()), name


HARD_TEXTS = [
    "",
    " ",
    "\n",
    "  two leading, two trailing  ",
    "runs   of     spaces" + " " * 1000,
    "tabs\t\t\tand\r\nwindows\rlines\r\n",
    "\n\n\n\n\n        x\n" + " " * 37 + "y",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581c\n\u2581\u2581\u2581\u2581d",
    "\0 and a\0b",
    "".join(map(chr, range(256))),
    "<s></s><unk><pad><0x0A><0xE2><0x96><0x81>",
    "\ufeffmark \u200b\u00a0\u3000\u2028\u2029\u0085 \u2047\u2585 \ufffd\uffff",
    "é e\u0301 ﬁ Å Å 日本語 \U0001f600\U0010ffff",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_back_exactly_and_their_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_random_text_of_awkward_characters_comes_back_exactly(tokenizer):
    draw = random.Random(0)
    alphabet = [*" \n\t\r\0\u2581<>/s0xA_é日\U0001f600", "    ", "<s>", "\n    ", "def "]
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randrange(60)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_gives_special_tokens_and_special_tokens_give_no_text(tokenizer):
    specials = {tokenizer.bos_id, tokenizer.eos_id}
    assert len(specials) == 2
    assert not specials & set(tokenizer.encode("<s> and </s>\n<s>"))
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(" a b "), tokenizer.eos_id]) == " a b "
    assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]


def test_batches_and_threads_do_not_change_the_tokens(tokenizer, texts):
    sample = [*HARD_TEXTS, *texts[:20]]
    one_by_one = [tokenizer.encode(text) for text in sample]
    for threads in (1, 3):
        assert [ids.tolist() for ids in tokenizer.encode_batch(sample, threads)] == one_by_one


def test_a_line_break_is_one_token_and_so_are_four_spaces(tokenizer):
    for levels in range(9):
        assert len(tokenizer.encode("\n" + " " * 4 * levels)) == 1 + levels
    parts = ["\n", "    ", "    ", "return"]
    assert tokenizer.encode("x:" + "".join(parts))[-4:] == [tokenizer.encode(part)[0] for part in parts]


def test_training_is_a_function_of_the_set_of_texts(tokenizer, texts, tmp_path):
    again = train_tokenizer(reversed(texts), tmp_path / "again.model", VOCAB_SIZE, seed=0)
    assert again.sha256 == tokenizer.sha256
    other = train_tokenizer(texts[1:], tmp_path / "other.model", VOCAB_SIZE, seed=0)
    assert other.sha256 != tokenizer.sha256


def test_training_writes_nothing_to_the_terminal(texts, tmp_path, capfd):
    train_tokenizer(["a \0 null, \u2047 and \u2581", *texts[:50]], tmp_path / "t.model", 600, seed=0)
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_too_large_for_the_text_is_refused_with_the_largest_that_works(tmp_path):
    small = ["the cat sat on the mat\n", "the dog sat on the log\n"]
    with pytest.raises(ValueError, match=r"data\.vocab_size: 4096 is too large .* (\d+) at most") as error:
        train_tokenizer(small, tmp_path / "t.model", 4096, seed=0)
    largest = int(str(error.value).split()[-3])
    assert train_tokenizer(small, tmp_path / "t.model", largest, seed=0).vocab_size == largest
    with pytest.raises(ValueError, match=r"data\.vocab_size"):
        train_tokenizer(small, tmp_path / "t.model", largest + 1, seed=0)


def test_a_vocabulary_too_small_is_refused_with_the_smallest_that_works(tmp_path):
    small = ["the cat sat on the mat\n"]
    with pytest.raises(ValueError, match=r"data\.vocab_size: 100 is too small; .* (\d+) at least") as error:
        train_tokenizer(small, tmp_path / "t.model", 100, seed=0)
    smallest = int(str(error.value).split()[-3])
    assert train_tokenizer(small, tmp_path / "t.model", smallest, seed=0).vocab_size == smallest
    with pytest.raises(ValueError, match=r"data\.vocab_size"):
        train_tokenizer(small, tmp_path / "t.model", smallest - 1, seed=0)


def test_text_that_trains_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.paths"):
        train_tokenizer([], tmp_path / "t.model", 4096, seed=0)


def test_the_training_sample_is_bounded_seeded_and_independent_of_order():
    texts = [f"{i:04d}" * 25 for i in range(100)]
    sample = _sample(texts, 2500, seed=0)
    assert len(sample) == 25 and set(sample) < set(texts)
    assert _sample(texts[::-1], 2500, seed=0) == sample
    assert set(_sample(texts, 2500, seed=1)) != set(sample)
    assert set(_sample(texts, 10_000, seed=0)) == set(texts)
    assert len(_sample(texts, 10, seed=0)) == 1


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "t.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"t\.model is not a sentencepiece model"):
        Tokenizer(tmp_path / "t.model")


@pytest.mark.parametrize("absent", ["bos_id", "eos_id"])
def test_a_model_without_eos_is_refused_and_one_without_bos_begins_with_its_eos(texts, tmp_path, absent):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:20]), model_writer=model, vocab_size=400, minloglevel=2, **{absent: -1}
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    if absent == "eos_id":
        with pytest.raises(ValueError, match="no eos token"):
            Tokenizer(tmp_path / "t.model")
    else:
        tokenizer = Tokenizer(tmp_path / "t.model")
        assert tokenizer.bos_id == tokenizer.eos_id >= 0


def test_token_bytes_is_one_number_for_every_token(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,) == (VOCAB_SIZE,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert (tokenizer.token_bytes == 0).sum() == 3  # unk, bos, eos
