"""The objects that a training step needs besides the model: optimizer, Grass, master weights."""

from dataclasses import dataclass

import torch

from optim.grass import Grass
from optim.mixed_precision import MasterWeights
from optim.norm_growth import NormGrowthLimiter
from optim.step_in_backward import StepInBackward


@dataclass
class Optimization:
    """The inner optimizer, what steps along with it by hooks, and what is done to the gradients before a step."""

    optimizer: torch.optim.Optimizer
    masters: MasterWeights | None
    grass: Grass | None
    limiter: NormGrowthLimiter | None
    in_backward: StepInBackward | None
