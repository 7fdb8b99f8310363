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
    """First part of the prepared folder's name."""
    source: str = "stdlib"
    """`stdlib`: the source code of Python's standard library; `text`, `records` (Parquet and JSON lines, also .gz and
    .zst), `instructions`, `c4`: the files of `paths`; `datasets`: `dataset`, read by Hugging Face's library; `tokens`:
    the files of `paths`, with tokens made by another program; `mixture`: several corpora.
    """
    paths: list[str] = field(default_factory=list)
    """Files, folders and globs to read."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.py"])
    """Which file names to take from folders."""
    max_bytes: int = 30_000_000
    """Maximum total size of the files of a corpus; further files are left out, those in test folders first."""
    validation_paths: list[str] = field(default_factory=list)
    """Files for validation, instead of a share of the documents; their documents are removed from training."""
    column: str = "text"
    """The column with the text, for JSON lines, Parquet and datasets."""
    token_dtype: str = "uint16"
    """For source `tokens`: the dtype of the tokens in files other than .npy."""
    dataset: str | None = None
    """For source `datasets`: a name on the hub, or a folder."""
    dataset_name: str | None = None
    """The configuration of the dataset."""
    dataset_split: str = "train"
    """The split of the dataset to read."""
    dataset_revision: str | None = None
    """A commit, branch or tag of the dataset on the hub."""
    streaming: bool = True
    """Read the dataset over the network, without a copy on this machine."""
    mixture: list[Any] = field(default_factory=list)
    """For source `mixture`: for each corpus its `weight`, and its settings that differ from the common ones."""
    tokenizer: str | None = None
    """A sentencepiece model or a tokenizer.json to use; if not set, one is trained on the training split."""
    bos: str | None = None
    """The token that begins a document, if the tokenizer's files do not name it."""
    eos: str | None = None
    """The token that ends a document, if the tokenizer's files do not name it."""
    vocab_size: int = 4096
    """Vocabulary size of the tokenizer to train, or of the given `tokenizer`."""
    validation_share: float = 0.05
    """Share of the documents to hold out for validation; not used by `c4` and with `validation_paths`."""
    root: str = "prepared"
    """Folder of all prepared datasets."""
    seed: int = 0
    """Seed for the choice of held-out documents and of the text that trains a tokenizer."""
    shard_tokens: int = 2**28
    """A shard ends with the document that reaches this number of tokens."""
    workers: int | None = None
    """Worker processes that tokenise; if not set, one per core, or per two cores if a run trains meanwhile."""
