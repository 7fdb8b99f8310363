"""Learning-rate schedules: the factor on the peak rate as a function of the step."""

import math

SCHEDULES = ("cosine", "wsd", "constant")


def warmup_updates(warmup: float, total: int) -> int:
    """The number of updates of a warm-up in a run of ``total`` updates.

    Args:
        warmup: a number of updates, or, between 0 and 1, a share of ``total``; a share never includes the last update.
    """
    return min(round(warmup * total), max(0, total - 1)) if 0 < warmup < 1 else int(warmup)


def rate_factor(
    step: int, *, total: int, schedule: str, warmup: float = 0, final: float = 0.1, decay_share: float = 0.2
) -> float:
    """The factor on the peak rate for the update from ``step`` to ``step + 1`` (0 ≤ step < total).

    Linear warm-up from 1/n to 1 over the n updates of ``warmup``, then

    - ``cosine``: half a cosine from 1 to ``final`` at the last update (Loshchilov & Hutter, arXiv 1608.03983)
    - ``wsd``: 1, then linear to ``final`` over the last ``decay_share`` of all updates (warm-up, stable, decay: Hu et
      al., arXiv 2404.06395)
    - ``constant``: 1

    Args:
        step: updates made so far.
        total: updates of the run.
        schedule: "cosine", "wsd" or "constant".
        warmup: updates, or a share of ``total``, see ``warmup_updates``.
        final: the factor in the last update, 0 … 1.
        decay_share: 0 … 1, for "wsd".

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
    warmup = warmup_updates(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    last = total - 1
    if schedule == "constant" or step >= last:
        return 1.0 if schedule == "constant" else final
    if schedule == "cosine":
        progress = (step - warmup) / max(1, last - warmup)
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    decay = max(1, round(decay_share * total))
    return min(1.0, final + (1 - final) * (last - step) / decay)
