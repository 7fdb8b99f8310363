"""Which checkpoints are deleted."""

from pathlib import Path

from pretrain.checkpoint.directory import UNFINISHED, checkpoints_in, remove, step_of


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints that are no longer needed: those outside ``keep_last`` and ``keep_every``.

    Damaged checkpoints that were set aside stay.

    Args:
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        keep_every: keep checkpoints at multiples of this step too; 0 for none.
    """
    if not keep_last:
        return
    for path in checkpoints_in(folder)[keep_last:]:
        if keep_every == 0 or step_of(path) % keep_every:
            remove(path.rename(path.with_suffix(UNFINISHED)))
