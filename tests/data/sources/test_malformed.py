"""Files of any content: a message that names them, or a counted skip; no traceback of another kind, no hang.

Everyday a few of each kind; all 500 with `pytest -m slow tests/data/sources/test_malformed.py`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.inspect import damages
from data.prepare import prepare
from data.settings import DataSettings
from data.token_dataset import load
from data.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parents[3]
SHARDS = ["train-00000.bin", "train-00000.index.npy", "train-00000.names", "val-00000.bin", "val-00000.index.npy"]

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
LINES = st.lists(
    st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"text": JSON}).map(lambda value: json.dumps(value).encode()),
    max_size=12,
)


def limits(few: int, name: str):
    """`few` cases everyday, 125 when slow: always the same ones."""
    usual = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=125 if name == "slow" else few, **usual)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A preparation, and a folder to break copies of it in."""
    folder = tmp_path_factory.mktemp("malformed")
    own = DataSettings(
        name="own", source="text", paths=[str(REPO / "models")], vocab_size=400, validation_share=0.2, root=str(folder)
    )
    return prepare(own).folder, folder / "broken"


def opened(folder: Path) -> str | None:
    """What is said of a preparation: None when it loads, is read through, and all is well with it."""
    try:
        prepared = load(folder)
        for tokens in (prepared.train, prepared.val):
            tokens[0 : len(tokens)].sum()
        return "; ".join(damages(prepared)) or None
    except ValueError as error:
        assert str(folder) in str(error) and "Traceback" not in str(error) and len(str(error)) < 2000
        return str(error)


def broken(intact, name: str, content: bytes) -> Path:
    folder, copy = intact
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    return copy


def paths_of(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_of(child, (*path, key))


def with_(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_(value[path[0]], path[1:], new)
    return copy


def check_manifests(intact, few):
    manifest = json.loads((intact[0] / "manifest.json").read_text())
    places = [
        path for path in paths_of(manifest) if not path[:1] or path[0] in ("format", "dtype", "splits", "tokenizer")
    ]
    texts = st.tuples(st.sampled_from(places), JSON).map(lambda c: json.dumps(with_(manifest, *c)).encode())

    @limits(*few)
    @given(texts | st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
    def run(content):
        folder = broken(intact, "manifest.json", content)
        if opened(folder) is None:  # what was changed is not what tokens are made of
            assert json.loads(content)["splits"]["train"]["shards"]

    run()


def check_shards(intact, few):
    @limits(*few)
    @given(st.sampled_from(SHARDS), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
    def run(name, where, change, cut):
        content = bytearray((intact[0] / name).read_bytes())
        place = int(where * len(content))
        content[place] ^= change
        assert opened(broken(intact, name, bytes(content[:place] if cut else content)))

    run()


def check_lines(intact, few, tmp_path):
    @limits(*few)
    @given(LINES)
    def run(lines):
        shutil.rmtree(tmp_path / "lines", ignore_errors=True)
        (tmp_path / "lines").mkdir()
        (tmp_path / "lines" / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}\n' + b"\n".join(lines))
        own = DataSettings(
            name="lines", source="records", paths=[str(tmp_path / "lines")], patterns=["*"], vocab_size=400,
            tokenizer=str(intact[0] / "tokenizer.model"), validation_share=0.5, root=str(tmp_path / "lines" / "root"),
        )  # fmt: skip
        corpus = prepare(own).manifest["corpus"]
        written = b"\n".join(lines).split(b"\n")
        there = sum(1 for line in written if line.strip(b" \t\n\r\x0b\x0c"))
        assert corpus["documents"] + sum(corpus["skipped_counts"].values()) == 2 + there
        assert corpus["documents"] == 2 + sum(has_text(line) for line in written)

    run()


def has_text(line: bytes) -> bool:
    try:
        text = json.loads(line)["text"]
        return isinstance(text, str) and len(text.encode()) > 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def check_tokenizers(intact, few, tmp_path):
    model = (intact[0] / "tokenizer.model").read_bytes()
    cut = st.tuples(st.integers(0, len(model) - 1), st.integers(1, 255), st.booleans())

    @limits(*few)
    @given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()) | cut)
    def run(change):
        content = change
        if isinstance(change, tuple):
            place, flip, ends = change
            changed = bytearray(model)
            changed[place] ^= flip
            content = bytes(changed[:place] if ends else changed)
        file = tmp_path / "t.model"
        file.write_bytes(content)
        try:
            tokenizer = Tokenizer(file)
        except ValueError as error:
            assert str(file) in str(error) and len(str(error)) < 2000
            return
        ids = tokenizer.encode("a text\n")  # what was flipped left a model that works
        assert isinstance(tokenizer.decode(ids), str) and all(0 <= i < tokenizer.vocab_size for i in ids)

    run()


@pytest.mark.parametrize("few", [(6, "everyday"), pytest.param((125, "slow"), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", ["manifests", "shards", "lines", "tokenizers"])
def test_malformed(intact, kind, few, tmp_path):
    folder = [tmp_path] if kind in ("lines", "tokenizers") else []
    {"manifests": check_manifests, "shards": check_shards, "lines": check_lines, "tokenizers": check_tokenizers}[kind](
        intact, few, *folder
    )


def test_an_untouched_preparation_is_well(intact):
    assert opened(intact[0]) is None
    assert np.dtype(load(intact[0]).manifest["dtype"]) == np.uint16
