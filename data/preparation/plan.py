"""The plan of a preparation: its files, its identity, and the names of its folders."""

import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from data.atomic import sha256
from data.checks import examine, folder_problems, mixture_parts
from data.settings import DataSettings
from data.token_dataset import FORMAT, MANIFEST
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

HEX12 = 12 * "[0-9a-f]"
IF_NOT_DEFAULT = (
    "column", "token_dtype", "dataset", "dataset_name", "dataset_split", "dataset_revision", "bos", "eos",
    "shard_tokens",
)  # fmt: skip
"""Settings that are part of the identity only if they differ from their default."""


class PreparationPlan:
    """The plan of a preparation, for `settings` and the current files of the corpus.

    Attributes:
        files: The files of the corpus; empty for a mixture and for a dataset on the hub.
        parts: For a mixture, the plan and the weight of each corpus; else empty.
        problems: One message, with the key and the fix, per problem that is found without reading the corpus. All other
            properties and methods need a plan without problems.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.settings, self.root = settings, Path(settings.root)
        self.parts: list[tuple[PreparationPlan, float]] = []
        self.files, self.problems = examine(settings)
        if settings.source == "mixture":
            self._plan_parts()
        elif not self.problems:
            self.problems = folder_problems(settings) if self.finished() is None else []

    def _plan_parts(self) -> None:
        try:
            self.parts = [(PreparationPlan(part), weight) for part, weight in mixture_parts(self.settings)]
        except (ValueError, TypeError) as error:
            self.problems += str(error).splitlines()
        self.problems += [f"{line} (in {plan.settings.name})" for plan, _ in self.parts for line in plan.problems]

    def require_no_problems(self) -> None:
        """Raise ValueError with all problems, one line each, if there are any."""
        if self.problems:
            raise ValueError("\n".join(self.problems))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All inputs that determine the tokens, except the text itself."""
        default, s = DataSettings(), self.settings
        return {
            "format": FORMAT,
            "source": s.source,
            "tokenizer": s.tokenizer and sha256(Path(s.tokenizer)),
            "vocab_size": s.vocab_size,
            "validation_share": s.validation_share,
            "seed": s.seed,
            **{key: getattr(s, key) for key in IF_NOT_DEFAULT if getattr(s, key) != getattr(default, key)},
            **({"encoding": 2} if s.tokenizer and Tokenizer(s.tokenizer, s.bos, s.eos).encoding > 1 else {}),
            **({"held_out": [f.name for f in self.files if f.held_out]} if s.validation_paths else {}),
        }

    @property
    def validation_files(self) -> list[list[Any]]:
        """The name and the size in bytes of each separate validation file."""
        return [[file.name, file.size] for file in self.files if file.held_out]

    @cached_property
    def marker(self) -> str:
        """The name of the empty file that marks a folder as the preparation of the current files.

        With it, a later call finds the folder without reading the corpus.
        """
        files = [[f.name, str(f.path), f.size, f.mtime] for f in self.files]
        return f".seen-{hash_of(self.identity, files)[:16]}"

    @property
    def work_folder(self) -> Path:
        """The hidden folder to which the preparation is written; it gets its final name when it is complete."""
        return self.root / f".{self.settings.name}-{self.marker[-16:]}.tmp"

    def folder(self, corpus_sha256: str) -> Path:
        """The path of the complete preparation, which need not exist, of a corpus with this `Corpus.sha256`."""
        return self.root / f"{self.settings.name}-{hash_of(self.identity, corpus_sha256)[:12]}"

    def finished(self) -> Path | None:
        """The folder of the complete preparation that is marked with the current files; None if there is none."""
        try:
            found = next(self.root.glob(f"{self.settings.name}-{HEX12}/{self.marker}"), None)
        except OSError:  # such as a name that is too long, which folder_problems reports
            return None
        return found.parent if found else None

    def log_changes(self, corpus_sha256: str | None) -> None:
        """Log how this preparation differs from the newest complete preparation of the same name, if there is one.

        `corpus_sha256` is `Corpus.sha256`; None leaves out the comparison of the text.
        """
        found = self.root.glob(f"{self.settings.name}-{HEX12}/{MANIFEST}")
        manifests = [path for path in found if path.is_file()]
        if not manifests:
            return
        newest = max(manifests, key=lambda path: path.stat().st_mtime)
        try:
            manifest = json.loads(newest.read_text())
            old = {**manifest["identity"], "corpus": manifest["corpus"]["sha256"][:12]}
        except (OSError, KeyError, TypeError, ValueError):
            logger.warning("%s: cannot be read, and is left unchanged", newest)
            return
        new = {**self.identity, **({"corpus": corpus_sha256[:12]} if corpus_sha256 else {})}
        changes = [f"{key} {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key]]
        difference = ", ".join(changes) or "its files differ"
        logger.info("%s cannot be reused: %s; preparing again", newest.parent, difference)


def hash_of(*parts: Any) -> str:
    """The SHA-256 of the JSON text of `parts`, 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
