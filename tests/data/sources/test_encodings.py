"""Text is decoded by its byte-order mark or as UTF-8; anything else is counted by its true reason."""

import bz2
import codecs
import gzip
import json
import lzma
import random
from dataclasses import replace

import pyarrow as pa
import pytest

from data.prepare import prepare
from data.settings import DataSettings
from data.sources import records
from data.sources.documents import Document
from data.sources.files import text_files
from data.sources.parse_record import Parser
from data.text_encoding import UNMARKED, Utf8Reader
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer

TEXTS = [
    "The word 中文 means Chinese.\r\n",
    "ਊ and 上: U+0A0A and U+4E0A have a byte 0A\n",
    "é\u2028\u0085 \U0001f600 \x0b",
]
MARKED = {
    "utf-8": b"", "utf-8-sig": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE,
}  # fmt: skip
UNREADABLE = {
    "latin-1": ("é and more".encode("latin-1"), "not UTF-8"),
    "gb18030": ("中文中文".encode("gb18030"), "not UTF-8"),
    "utf-8, cut": ("é".encode()[:1], "not UTF-8"),
    "utf-8 mark, then latin-1": (codecs.BOM_UTF8 + b"\xe9", "not UTF-8"),
    "half a pair as utf-8": (b"a \xed\xa0\x80 b", "not UTF-8"),
    "utf-16, cut": ("ab".encode("utf-16")[:-1], "not UTF-16"),
    "utf-16, half a pair": (codecs.BOM_UTF16_LE + b"a\x00\x00\xd8b\x00", "not UTF-16"),
    "utf-32, cut": ("ab".encode("utf-32")[:-2], "not UTF-32"),
    "utf-32, beyond unicode": (codecs.BOM_UTF32_LE + b"\x00\x00\x00\x7f", "not UTF-32"),
    "utf-16 le without a mark": ("Latin letters".encode("utf-16-le"), UNMARKED),
    "utf-16 be without a mark": ("Latin letters, é\n".encode("utf-16-be"), UNMARKED),
    "utf-32 without a mark": ("Latin letters".encode("utf-32-le"), UNMARKED),
    "gzip under another name": (gzip.compress(b"x"), "compressed with gzip, but its name does not end in .gz"),
    "zstd under another name": (b"(\xb5/\xfd\x04\x00", "compressed with zstd, but its name does not end in .zst"),
    "xz": (lzma.compress(b"x"), "compressed with xz, which is not supported"),
    "bzip2": (bz2.compress(b"x"), "compressed with bzip2, which is not supported"),
    "a mark and nothing else": (codecs.BOM_UTF16_BE, "empty"),
    "nothing": (b"", "empty"),
}


def encoded(text: str, encoding: str) -> bytes:
    return MARKED[encoding] + text.encode(encoding.removesuffix("-sig"))


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def read(path, column=None):
    """The texts of a file, and the problems of those records that have none."""
    parse = Parser(column or "text")
    found = [parse(record) for record in records.Records(text_files([str(path)], ["*"], 2**40), column)]
    return [one.text for one in found if isinstance(one, Document)], [one for one in found if isinstance(one, str)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("encoding", MARKED)
def test_a_text_is_what_was_written(tmp_path, encoding, packed):
    text = "".join(TEXTS)
    (tmp_path / f"a.txt{packed}").write_bytes(PACKED[packed](encoded(text, encoding)))
    assert read(tmp_path / f"a.txt{packed}") == ([text], [])


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("encoding", MARKED)
def test_json_lines_are_what_was_written(tmp_path, encoding, packed, monkeypatch):
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in TEXTS) + "\r\n"
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACKED[packed](encoded(lines, encoding)))
    assert read(tmp_path / f"a.jsonl{packed}", "text") == (TEXTS, [])


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_text_that_cannot_be_read_has_the_reason(tmp_path, name):
    content, problem = UNREADABLE[name]
    (tmp_path / "a.txt").write_bytes(content)
    assert read(tmp_path / "a.txt") == ([], [problem])


@pytest.mark.parametrize("name", [name for name in UNREADABLE if UNREADABLE[name][1] == UNMARKED])
def test_json_lines_without_a_mark_are_one_problem_of_the_file(tmp_path, name):
    encoding = "utf-32-le" if "32" in name else "utf-16-le" if "le" in name else "utf-16-be"
    (tmp_path / "a.jsonl").write_bytes("".join(json.dumps({"text": t}) + "\n" for t in "abc").encode(encoding))
    assert read(tmp_path / "a.jsonl", "text") == ([], [UNMARKED])


@pytest.mark.parametrize(
    ("encoding", "line", "problem"),
    [
        ("utf-8", b'{"text": "\xe9"}\n', "not UTF-8"),
        ("utf-8", b'{"text": "\xed\xa0\x80"}\n', "not UTF-8"),
        ("utf-8", b"\xff\xfe\n", "not UTF-8"),
        ("utf-8", b'{"text": "\\ud800"}\n', "with half of a surrogate pair"),
        ("utf-8", b'{"text": "cut\n', "not JSON"),
        ("utf-8", b"'text'\n", "not JSON"),
        ("utf-8", b'{"other": "x"}\n', "without a text"),
        ("utf-16-le", b"\x00\xd8\n\x00", "not UTF-16"),
        ("utf-16-be", b"\xdc\x00\x00\n", "not UTF-16"),
        ("utf-32-be", b"\x00\x00\xd8\x00\x00\x00\x00\n", "not UTF-32"),
    ],
)
def test_a_line_that_cannot_be_read_leaves_the_others(tmp_path, encoding, line, problem):
    before, after = '{"text": "before"}\n', '{"text": "after 中"}'
    (tmp_path / "a.jsonl").write_bytes(encoded(before, encoding) + line + after.encode(encoding))
    assert read(tmp_path / "a.jsonl", "text") == (["before", "after 中"], [problem])


@pytest.mark.parametrize("encoding", list(MARKED)[1:])
def test_marks_of_joined_files_are_no_text(tmp_path, encoding):
    line = encoded('{"text": "x"}\n', encoding)
    (tmp_path / "a.jsonl").write_bytes(3 * line)
    assert read(tmp_path / "a.jsonl", "text") == (3 * ["x"], [])


def test_a_mark_within_a_text_stays(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "a\ufeffb\n\ufeffc".encode())
    assert read(tmp_path / "a.txt")[0] == ["a\ufeffb\n\ufeffc"]


@pytest.mark.parametrize("encoding", MARKED)
def test_pieces_end_between_any_bytes(tmp_path, encoding, monkeypatch):
    """Characters and line ends lie across the pieces that a file is read in, and memory holds a piece."""
    draw = random.Random(0)
    text = "".join(draw.choices("a\n\r中ਊ\U0001f600é\u2028", k=5000))
    (tmp_path / "a.txt").write_bytes(encoded(text, encoding))
    monkeypatch.setattr("data.text_encoding.HEAD_BYTES", 5)
    monkeypatch.setattr("data.text_encoding.BLOCK_BYTES", 7)
    monkeypatch.setattr(records, "CHUNK_BYTES", 11)
    assert read(tmp_path / "a.txt") == ([text], [])
    with open(tmp_path / "a.txt", "rb") as file:
        reader = Utf8Reader(file)
        assert b"".join(iter(lambda: reader.read(3), b"")).decode() == text


def test_a_corpus_in_many_encodings_is_prepared_as_its_text(tmp_path):
    """Training files, validation files and the sample of the tokenizer."""
    texts = [f"Line {number} of the text, in 中文 {number * 7}.\n" * 3 for number in range(12)]
    folders = []
    for form in ("plain", "mixed"):
        for number, text in enumerate(texts):
            folder = tmp_path / form / ("held" if number % 4 == 0 else "files")
            folder.mkdir(parents=True, exist_ok=True)
            encoding = list(MARKED)[number % len(MARKED)] if form == "mixed" else "utf-8"
            (folder / f"{number}.txt").write_bytes(encoded(text, encoding))
        settings = DataSettings(
            name=form, source="text", paths=[str(tmp_path / form / "files")], vocab_size=320,
            validation_paths=[str(tmp_path / form / "held")], root=str(tmp_path / "prepared"),
        )  # fmt: skip
        folders.append(prepare(settings))
    plain, mixed = folders
    assert plain.fingerprint == mixed.fingerprint
    assert (plain.train.document_count, plain.val.document_count) == (9, 3)


def test_the_files_of_a_tokenizer_may_begin_with_a_mark(tmp_path):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.add_special_tokens(["<end>"])
    made.add_tokens(["a"])
    plain = made.to_str()
    (tmp_path / "tokenizer.json").write_text(plain, encoding="utf-8-sig")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}), encoding="utf-16")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.decode(tokenizer.encode("a"))) == (0, "a")
    (tmp_path / "copy").mkdir()
    assert Tokenizer(tokenizer.copy_to(tmp_path / "copy")).sha256 == tokenizer.sha256


def test_a_broken_line_of_instructions_is_named_with_its_reason(tmp_path):
    train_tokenizer(["prompt response\n"] * 3, tmp_path / "t.model", 280, seed=0)
    line = json.dumps({"prompt": "a", "response": "b"}).encode() + b"\n"
    for broken, problem in ((b"\xff\n", "not UTF-8"), (b"{\n", "not a JSON object")):
        (tmp_path / "a.jsonl").write_bytes(line + broken)
        settings = DataSettings(
            source="instructions", paths=[str(tmp_path / "a.jsonl")], tokenizer=str(tmp_path / "t.model"),
            vocab_size=280, root=str(tmp_path / "prepared"),
        )  # fmt: skip
        with pytest.raises(ValueError, match=rf"line 2 of .*a\.jsonl is {problem}.*; fix that line"):
            prepare(settings)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data\.paths: data=instructions reads JSON lines, .*; convert .*a\.parquet"):
        prepare(replace(settings, paths=[str(tmp_path / "a.parquet")]))
