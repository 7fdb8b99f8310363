"""Counters of a run in ``state.json`` of a checkpoint. For tensors, see pretrain.checkpoint.tensors."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainingState:
    """The state of a run after ``step`` steps, except its tensors.

    ``data`` identifies the tokens and the tokenizer. A field with a default may be missing in an older checkpoint.
    """

    step: int
    tokens: int
    seconds: float  # wall time of the run, over all its resumes
    training_seconds: float  # the part of it in training steps
    world_size: int
    data: dict[str, Any]
    skipped: int = 0  # steps without an update
    losses: list[float] = field(default_factory=list)  # the latest, in nats per target, to detect a spike
    rates: dict[str, Any] = field(default_factory=dict)  # pretrain.training.rates.rate_settings
    init_from: dict[str, str] | None = None  # pretrain.inference.init_from.InitialWeights.identity

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainingState":
        """Read the content of ``state.json``, which ``read_state`` has checked. Unknown keys are ignored."""
        informative = {"tokens": 0, "world_size": 0}  # written only as information
        return cls(**informative | {f.name: content[f.name] for f in fields(cls) if f.name in content})
