"""The identity of a preparation, and the names of its folders."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from data.atomic import sha256
from data.settings import DataSettings
from data.sources.files import SourceFile
from data.token_dataset import FORMAT, MANIFEST

logger = logging.getLogger(__name__)
HEX12 = 12 * "[0-9a-f]"


def work_folder(settings: DataSettings, marker: str) -> Path:
    """Where the preparation with this marker is written before it is whole."""
    return Path(settings.root) / f".{settings.name}-{marker[-16:]}.tmp"


def _folder(settings: DataSettings, files: list[SourceFile], corpus: str) -> Path:
    return Path(settings.root) / f"{settings.name}-{hashed(identity(settings, files), corpus)[:12]}"


def marked_folder(settings: DataSettings, marker: str) -> Path | None:
    """The folder of the preparation with this marker, if it is whole."""
    found = next(Path(settings.root).glob(f"{settings.name}-{HEX12}/{marker}"), None)
    return found.parent if found else None


def marker_of(settings: DataSettings, files: list[SourceFile]) -> str:
    """The name of the empty file that marks a preparation of these files as they are now."""
    return f".seen-{hashed(identity(settings, files), [[f.name, str(f.path), f.size, f.mtime] for f in files])[:16]}"


def _log_changes(settings: DataSettings, files: list[SourceFile], corpus: str | None) -> None:
    """Say in what the newest preparation of the same name differs, if there is one; `corpus` if that is known."""
    found = Path(settings.root).glob(f"{settings.name}-{HEX12}/{MANIFEST}")
    manifests = sorted(found, key=lambda path: path.stat().st_mtime)
    if not manifests:
        return
    try:
        before = json.loads(manifests[-1].read_text())
        old = {**before["identity"], "corpus": before["corpus"]["sha256"][:12]}
    except (KeyError, TypeError, json.JSONDecodeError):
        logger.warning("%s: cannot be read; it is left alone", manifests[-1])
        return
    new = {**identity(settings, files), **({"corpus": corpus[:12]} if corpus else {})}
    changes = [f"{key} {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key]]
    said = ", ".join(changes) or "its files are others"
    logger.info("%s does not fit: %s; preparing anew", manifests[-1].parent, said)


def hashed(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identity(settings: DataSettings, files: list[SourceFile]) -> dict[str, Any]:
    """What, besides the text, decides which tokens come out."""
    usual, s = DataSettings(), settings
    unusual = (
        "column",
        "token_dtype",
        "dataset",
        "dataset_name",
        "dataset_split",
        "dataset_revision",
        "bos",
        "eos",
        "shard_tokens",
    )
    return {
        "format": FORMAT,
        "source": s.source,
        "tokenizer": s.tokenizer and sha256(Path(s.tokenizer)),
        "vocab_size": s.vocab_size,
        "validation_share": s.validation_share,
        "seed": s.seed,
        **{key: getattr(s, key) for key in unusual if getattr(s, key) != getattr(usual, key)},
        **({"held_out": [f.name for f in files if f.held_out]} if s.validation_paths else {}),
    }
