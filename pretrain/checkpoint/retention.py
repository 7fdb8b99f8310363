"""Delete old checkpoints."""

import logging
from pathlib import Path

from pretrain.checkpoint.directory import UNFINISHED, checkpoints_in, point_at, remove, step_of

logger = logging.getLogger(__name__)


def tidy(newest: Path, keep_last: int, keep_every: int) -> None:
    """Make ``latest`` a link to the checkpoint ``newest``, and ``prune`` its folder; disk errors are only logged."""
    try:
        point_at(newest)
        prune(newest.parent, keep_last, keep_every)
    except OSError as error:
        logger.warning(
            "%s is complete, but the link `latest` could not be moved or older checkpoints could not be deleted: %s",
            *(newest, error),
        )


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints that are no longer needed: those outside ``keep_last`` and ``keep_every``.

    Damaged checkpoints that were renamed are kept.

    Args:
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        keep_every: also keep checkpoints at multiples of this step; 0 for none.
    """
    if not keep_last:
        return
    for path in checkpoints_in(folder)[keep_last:]:
        if keep_every == 0 or step_of(path) % keep_every:
            remove(path.rename(path.with_suffix(UNFINISHED)))
