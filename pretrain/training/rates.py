"""Learning rates of a run, and their changes when the run resumes with other settings."""

from dataclasses import asdict
from typing import Any

from optim.schedule import rate_factor
from pretrain.config.schema import Config

# Names of the peak rates, and their parameters.
RATES = {"optim.linear_lr": "the linear layers", "optim.lr": "the other parameters"}
JUMP = 1.05  # above this multiple of the planned rate, a rate is a jump


def schedule_factor(config: Config, step: int) -> float:
    """The schedule's factor for all peak rates at ``step`` (from 0)."""
    return _factor(rate_settings(config), step)


def peak_rates(config: Config) -> str:
    """The peak learning rates in words."""
    settings = rate_settings(config)
    linear = settings["linear_lr"] * settings.get("alpha", 1.0)
    return f"{linear:.3g} of the linear layers, {settings['lr']:.3g} of the other parameters"


def rate_settings(config: Config) -> dict[str, Any]:
    """The settings that determine the learning rates, JSON-serialisable; part of a checkpoint."""
    optim = asdict(config.optim)
    names = ("schedule", "warmup_steps", "final_lr", "decay_share", "lr", "linear_lr", "alpha")
    return {"steps": config.train.steps, **{name: optim[name] for name in names if name in optim}}


def describe_change(before: dict[str, Any] | None, config: Config, step: int) -> list[str]:
    """Messages about learning rates of a resumed run that differ from the rates planned in its checkpoint.

    [] if none differs. If the run has made more than ``train.steps`` steps, one message says so instead.

    Args:
        before: ``rate_settings`` in the checkpoint that the run resumes from; None if an older checkpoint lacks them.
        step: the first step to be trained, from 0.
    """
    now, steps = rate_settings(config), config.train.steps
    before = before or now
    if step >= steps:
        return [f"the run is at step {step}, but train.steps={steps}: no step is left to train"] if step > steps else []
    lines, shown = [], sorted({step, (step + steps) // 2, steps - 1})
    for name, parameters in RATES.items():
        if all(_rate(before, name, n) == _rate(now, name, n) for n in _sampled(step, steps)):
            continue
        points = []
        for n in shown:
            planned = f" (planned: {_rate(before, name, n):.3g})" if n < before["steps"] else ""
            points.append(f"{_rate(now, name, n):.3g} at step {n + 1}{planned}")
        lines.append(
            f"the learning rate of {parameters}: {_rate(before, name, step - 1):.3g} so far, {', '.join(points)}"
        )
    jump = _factor(now, step) / max(_factor(before, step), 1e-12)
    same_peaks = all(before.get(name) == now.get(name) for name in ("lr", "linear_lr", "alpha"))
    if lines and same_peaks and jump > JUMP:
        lines.append(
            f"step {step + 1} has {jump:.3g} times the planned learning rate; to lengthen a run without a jump, use "
            "optim.schedule=wsd, whose rate is constant until it decays, and resume from a checkpoint before the decay"
        )
    return lines


def _factor(settings: dict[str, Any], step: int) -> float:
    """The factor of ``step`` (from 0); after the planned last step, the factor of the last step."""
    return rate_factor(
        min(max(step, 0), settings["steps"] - 1),
        total=settings["steps"], schedule=settings["schedule"], warmup=settings["warmup_steps"],
        final=settings["final_lr"], decay_share=settings["decay_share"],
    )  # fmt: skip


def _rate(settings: dict[str, Any], name: str, step: int) -> float:
    peak = settings["lr"] if name == "optim.lr" else settings["linear_lr"] * settings.get("alpha", 1.0)
    return peak * _factor(settings, step)


def _sampled(first: int, stop: int) -> list[int]:
    """At most 1001 steps from ``first`` to ``stop`` - 1, including both."""
    return sorted({*range(first, stop, max(1, (stop - first) // 1000)), stop - 1})
