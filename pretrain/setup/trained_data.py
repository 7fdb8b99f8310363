"""Find the tokens that a resumed run was trained on, even without the corpus and the tokenizer."""

import logging
from contextlib import suppress
from dataclasses import fields
from typing import Any

from data.prepare import find_by_fingerprint
from data.prepare import problems as data_problems
from data.settings import DataSettings
from data.streaming.background import find_streamed
from data.token_dataset import PreparedDataset
from pretrain.checkpoint.directory import read_state
from pretrain.config.schema import Config
from pretrain.runs.folder import RunFolder

logger = logging.getLogger(__name__)


def state_to_resume(config: Config) -> dict[str, Any] | None:
    """The content of ``state.json`` in the run's newest checkpoint; None for a run that starts at step 0.

    {} if the file is damaged, or has a format that this version does not read.
    """
    newest = None
    with suppress(OSError, ValueError):  # the checks of settings report an invalid folder name
        newest = RunFolder(config).latest_checkpoint
    if newest is None:
        return None
    try:
        return read_state(newest)
    except ValueError:  # the run resumes from an older checkpoint, or is refused with the reason
        return {}


def find_trained_data(config: Config, state: dict[str, Any]) -> PreparedDataset | None:
    """The tokens that a run was trained on, if its corpus or tokenizer is missing.

    None if ``data.root`` does not contain all of the tokens, or if no file of corpus and tokenizer is missing. In the
    latter case, the files are compared with the checkpoint when they are opened.

    Args:
        state: from ``state_to_resume``.
    """
    settings, trained = data_settings(config), state.get("data", {})
    fingerprint = trained.get("fingerprint")
    if fingerprint is None or not (problems := data_problems(settings)):
        return None
    if config.data.on_the_fly:
        found = find_streamed(settings, fingerprint, validation_tokens(config))
    else:
        found = find_by_fingerprint(settings, fingerprint, trained.get("mixture"))
    if found:
        logger.warning("%s; resuming with the tokens of this run in %s", problems[0], found.folder)
    return found


def validation_tokens(config: Config) -> int:
    """The maximum number of tokens that a validation reads from a streamed dataset."""
    return config.train.eval_sequences * config.train.seq_len + 1


def data_settings(config: Config) -> DataSettings:
    """The settings in ``config.data`` that determine the preparation of the data."""
    return DataSettings(**{f.name: getattr(config.data, f.name) for f in fields(DataSettings)})
