"""What a corpus is made of and how it is tokenised: the settings, and the check that finds all that is wrong."""

from dataclasses import dataclass, field
from typing import Any

LINES = ("records", "instructions", "c4")  # of JSON, or rows of Parquet
SOURCES = ("stdlib", "text", *LINES, "tokens", "datasets", "mixture")
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")  # of token files


@dataclass(kw_only=True)
class DataSettings:
    """What to train on, and how it is tokenised and split."""

    name: str = "stdlib"
    """First part of the prepared folder's name."""
    source: str = "stdlib"
    """`stdlib`: the source of Python's standard library; `text`, `records` (Parquet and JSON lines, also .gz, .zst),
    `instructions`, `c4`: the files under `paths`; `datasets`: `dataset`, by Hugging Face's library;
    `tokens`: what another program tokenised; `mixture`: several of these.
    """
    paths: list[str] = field(default_factory=list)
    """Files, folders and globs."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.py"])
    """The file names taken from folders."""
    max_bytes: int = 30_000_000
    """Files that would exceed this are left out, tests first."""
    validation_paths: list[str] = field(default_factory=list)
    """Files of their own to hold out, instead of a share; what they hold is left out of training."""
    column: str = "text"
    """Of JSON lines, Parquet and datasets: which one is the text."""
    token_dtype: str = "uint16"
    """Of source `tokens`: of files that are no .npy."""
    dataset: str | None = None
    """Of source `datasets`: a name on the hub, or a folder."""
    dataset_name: str | None = None
    """Which of the dataset's configurations."""
    dataset_split: str = "train"
    """Which of the dataset's parts."""
    dataset_revision: str | None = None
    """A commit of the hub's."""
    streaming: bool = True
    """Read the dataset as it comes, without a copy of it on this machine."""
    mixture: list[Any] = field(default_factory=list)
    """Of source `mixture`: for each corpus its weight, and the settings in which it differs from these."""
    tokenizer: str | None = None
    """A sentencepiece model or a tokenizer.json to use; none: one is trained on the training split."""
    bos: str | None = None
    """The token that begins a document, when the tokenizer's file does not tell."""
    eos: str | None = None
    """The token that ends a document, when the tokenizer's file does not tell."""
    vocab_size: int = 4096
    """Of the tokenizer to train, or as the one brought has it."""
    validation_share: float = 0.05
    """Share of the documents that is held out."""
    root: str = "prepared"
    """Folder of all preparations."""
    seed: int = 0
    """Chooses the documents held out and the sample a tokenizer is trained on."""
    shard_tokens: int = 2**28
    """Tokens in a shard of the preparation; one more begins behind the document that reaches them."""
    workers: int | None = None
    """Processes that tokenise; none: as many as there are cores."""
