"""Learning rates of a run, as its settings describe them."""

from optim.schedule import rate_factor
from pretrain.config.schema import Config


def schedule_factor(config: Config, step: int) -> float:
    """The factor of the schedule on all peak rates for ``step`` (from 0)."""
    optim = config.optim
    return rate_factor(
        step, total=config.train.steps, schedule=optim.schedule, warmup=optim.warmup_steps, final=optim.final_lr,
        decay_share=optim.decay_share,
    )  # fmt: skip
