"""The settings of a corpus: its sources, tokenizer and splits."""

from dataclasses import dataclass, field
from typing import Any

LINES = ("records", "instructions", "c4")  # sources that are JSON lines or Parquet rows
SOURCES = ("stdlib", "text", *LINES, "tokens", "datasets", "mixture")
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")  # of token files


@dataclass(kw_only=True)
class DataSettings:
    """The settings of a corpus, for runs (`data.*`) and for `python -m data.prepare`."""

    name: str = "stdlib"
    """The beginning of the name of the prepared folder."""
    source: str = "stdlib"
    """`stdlib`: the source code of Python's standard library; `datasets`: a dataset that Hugging Face's library
    reads; `mixture`: several corpora. All other sources read the files of `paths`: `text`; `records` (Parquet and JSON
    lines, also .gz and .zst); `instructions` (JSON lines with the keys prompt and response); `c4` (the files of C4);
    `tokens` (tokens made by another program).
    """
    paths: list[str] = field(default_factory=list)
    """Files, folders and globs to read."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.py"])
    """Globs: only files with a matching name are taken from folders."""
    max_bytes: int = 30_000_000
    """Maximum total size in bytes of the files of a corpus. If it is exceeded, files are left out, beginning with those
    in test folders. `validation_paths` and `dataset` have no limit.
    """
    validation_paths: list[str] = field(default_factory=list)
    """For sources `text`, `records` and `instructions`: files, folders and globs with the validation text. Documents
    with the same text are left out of training. If empty, `validation_share` of the documents is held out.
    """
    column: str = "text"
    """For sources `records`, `c4` and `datasets`: the column, or the key of JSON lines, with the text."""
    token_dtype: str = "uint16"
    """For source `tokens`: the dtype of the tokens in files other than .npy: uint8, uint16, uint32, int32 or int64."""
    dataset: str | None = None
    """For source `datasets`: a name on Hugging Face's hub, or a folder."""
    dataset_name: str | None = None
    """The configuration of the dataset, if it has several."""
    dataset_split: str = "train"
    """The split of the dataset to read."""
    dataset_revision: str | None = None
    """A commit, branch or tag of the dataset on the hub; if not set, the newest commit."""
    streaming: bool = True
    """Read the dataset over the network without a copy on this machine, instead of downloading it first."""
    mixture: list[Any] = field(default_factory=list)
    """For source `mixture`: for each corpus a mapping with its `weight` (a number above 0) and the settings that differ
    from those of the mixture. The source of a corpus is `text` unless it is set here.
    """
    tokenizer: str | None = None
    """The file of a sentencepiece model, or a tokenizer.json; if not set, one is trained on the training split."""
    bos: str | None = None
    """The token that begins a document, if the tokenizer's files do not name it."""
    eos: str | None = None
    """The token that ends a document, if the tokenizer's files do not name it."""
    vocab_size: int = 4096
    """Vocabulary size of the tokenizer to train, or of the given `tokenizer`."""
    validation_share: float = 0.05
    """Share of the documents to hold out for validation; not used by `c4`, and not with `validation_paths`."""
    root: str = "prepared"
    """The folder in which prepared folders are created."""
    seed: int = 0
    """Seed for the choice of held-out documents and of the text that trains a tokenizer."""
    shard_tokens: int = 2**28
    """The tokens are stored in shards. A shard ends with the document that reaches this number of tokens."""
    workers: int | None = None
    """Processes that tokenise; if not set, one per core, or one per two cores if a run trains at the same time."""
