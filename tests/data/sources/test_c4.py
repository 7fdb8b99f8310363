"""C4's own files: every text as it stands, in the split that its file's name says; broken ones are named."""

import gzip
import json

import pytest

from data.prepare import prepare
from data.settings import DataSettings

TEXTS = {
    "c4-train.00000-of-01024.json.gz": [f"Training text {i}: two\nlines, ünïcode and \u2028 more." for i in range(60)],
    "c4-train.00001-of-01024.json.gz": ["Another file's text."],
    "c4-validation.00000-of-00008.json.gz": ["Held out.", "Held out as well, the Training text 1."],
}
PATTERNS = ["c4-train.*.json.gz", "c4-validation.*.json.gz"]


def write(folder, names=TEXTS):
    folder.mkdir()
    for name in names:
        with gzip.open(folder / name, "wt") as file:
            for text in TEXTS[name]:
                file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a"}) + "\n")
    return folder


def settings(tmp_path, folder, **more):
    return DataSettings(
        name="c4", source="c4", paths=[str(folder)], patterns=PATTERNS, vocab_size=300, root=str(tmp_path / "p"), **more
    )


def test_every_text_is_there_in_the_split_of_its_file(tmp_path):
    prepared = prepare(settings(tmp_path, write(tmp_path / "en")))
    for tokens, split in ((prepared.train, "train"), (prepared.val, "validation")):
        found = [prepared.tokenizer.decode(tokens.document(i)) for i in range(tokens.document_count)]
        assert found == [text for name, texts in TEXTS.items() if split in name for text in texts]


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("train", r"there is no c4-train.*git lfs pull"), ("validation", r"there is no c4-validation\.\*")],
)
def test_a_missing_split_and_a_missing_folder_are_named(tmp_path, left_out, message):
    folder = write(tmp_path / "en", [name for name in TEXTS if left_out not in name])
    with pytest.raises(ValueError, match=message):
        prepare(settings(tmp_path, folder))
    with pytest.raises(ValueError, match=r"no file or folder .*\n.*allenai/c4"):
        prepare(settings(tmp_path, tmp_path / "absent"))


def test_a_file_cut_short_and_a_pointer_are_named(tmp_path):
    folder = write(tmp_path / "en")
    train = folder / "c4-train.00000-of-01024.json.gz"
    whole = train.read_bytes()
    for content in (whole[:-20], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 319\n"):
        train.write_bytes(content)
        with pytest.raises(ValueError, match=r"gz cannot be read after line .*lfs pull"):
            prepare(settings(tmp_path, folder))
