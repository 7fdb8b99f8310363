"""The settings of a corpus: where its text comes from, how it is tokenised, and how it is split."""

from dataclasses import dataclass, field
from typing import Any

LINES = ("records", "instructions", "c4")  # sources of JSON lines or Parquet rows
SOURCES = ("stdlib", "text", *LINES, "tokens", "datasets", "mixture")
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")  # of token files


@dataclass(kw_only=True)
class DataSettings:
    """The settings of a corpus; a preparation and its command line have the same ones."""

    name: str = "stdlib"
    """First part of the prepared folder's name."""
    source: str = "stdlib"
    """`stdlib`: the source code of Python's standard library; `text`, `records` (Parquet and JSON lines, also .gz and
    .zst), `instructions`, `c4`: the files of `paths`; `datasets`: `dataset`, read by Hugging Face's library; `tokens`:
    tokens made by another program; `mixture`: several of these.
    """
    paths: list[str] = field(default_factory=list)
    """Files, folders and globs."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.py"])
    """Which file names to take from folders."""
    max_bytes: int = 30_000_000
    """Limit for the files of a corpus together; files beyond it are left out, tests first."""
    validation_paths: list[str] = field(default_factory=list)
    """Files to hold out for validation, instead of a share; documents that they hold are left out of training."""
    column: str = "text"
    """The column with the text, of JSON lines, Parquet and datasets."""
    token_dtype: str = "uint16"
    """The type of the tokens in files of source `tokens` that are not .npy."""
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
    """For source `mixture`: the weight of each corpus, and the settings in which it differs from these."""
    tokenizer: str | None = None
    """A sentencepiece model or a tokenizer.json to use; if not set, one is trained on the training split."""
    bos: str | None = None
    """The token that begins a document, if the tokenizer's files do not say."""
    eos: str | None = None
    """The token that ends a document, if the tokenizer's files do not say."""
    vocab_size: int = 4096
    """Size of the vocabulary of the tokenizer to train, or of the given `tokenizer`."""
    validation_share: float = 0.05
    """Share of the documents that is held out for validation."""
    root: str = "prepared"
    """Folder of all prepared datasets."""
    seed: int = 0
    """Chooses the documents that are held out and the sample for training a tokenizer."""
    shard_tokens: int = 2**28
    """Tokens in a shard; the document that reaches this number is the last in its shard."""
    workers: int | None = None
    """Processes that tokenise; if not set, one per core."""
