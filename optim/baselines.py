"""The baselines that Grass is compared with: GaLore, APOLLO and Fira, from their packages.

They use the same parameter groups, rates, schedule, clipping and checkpoints as all other optimizers here.
"""

import sys
from typing import Any

import torch

from optim.inner import inner_optimizer

# By name of the optimizer: additional settings of a projected group that its package needs.
PROJECTED: dict[str, dict[str, Any]] = {
    "galore": {"proj_type": "std"},
    "apollo": {"proj_type": "std", "proj": "random"},
    "fira": {"projection_type": "std"},
}
SCALE_TYPES = ("channel", "tensor")
CHANGING = ("ortho_matrix", "seed", "last_svd_step")  # state of projectors; their other attributes are settings


def projected_optimizer(
    name: str, groups: list[dict[str, Any]], *, rank: int, update_gap: int, scale: float, scale_type: str | None = None,
    **options: Any,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimizer "galore", "apollo" or "fira". It projects only the gradients of the group "linears".

    Args:
        name: "galore", "apollo" or "fira".
        groups: from ``optim.param_groups.parameter_groups``.
        rank: the rank of the projected gradients.
        update_gap: steps between two computations of the projection.
        scale: factor on the projected update; APOLLO multiplies by its square root.
        scale_type: for APOLLO "channel", or "tensor" for APOLLO-Mini; None for the others.
        options: options of the optimizer, such as betas.

    Raises:
        ValueError: the package is not installed, or does not support the weight decay of a group.
    """
    projection = {"rank": rank, "update_proj_gap": update_gap, "scale": scale, **PROJECTED[name]}
    if scale_type is not None:
        projection["scale_type"] = scale_type
    groups = [group | projection if group["name"] == "linears" else group for group in groups]
    optimizer = inner_optimizer(name, groups, no_deprecation_warning=True, **options)
    StateInTensors(optimizer)
    return optimizer


class StateInTensors:
    """Keeps the state of ``optimizer`` in tensors between steps, for checkpoints; attached by step hooks.

    The packages keep numbers and a projector object in a parameter's state, and Fira keeps its step count in the group.
    After a step, these are converted to tensors in the state: those of the projector are named ``projector_…``, and
    Fira's count ``group_step``. Before the next step, all are converted back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer: Any = optimizer
        self._pack()
        optimizer.register_step_pre_hook(self._unpack)
        optimizer.register_step_post_hook(self._pack)

    def _pack(self, *_) -> None:
        for group in self.optimizer.param_groups:
            for state in filter(None, map(self.optimizer.state.get, group["params"])):
                if "projector" in state:
                    attributes = vars(state.pop("projector"))
                    changing = {f"projector_{name}": attributes[name] for name in CHANGING if name in attributes}
                    state |= {name: torch.as_tensor(value).contiguous() for name, value in changing.items()}
                if "step" in group:
                    state["group_step"] = group["step"]
                state |= {name: torch.tensor(value) for name, value in state.items() if isinstance(value, int)}

    def _unpack(self, *_) -> None:
        place = 0
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                place += 1
                state = self.optimizer.state[p]
                state |= {name: int(value) for name, value in state.items() if not value.is_floating_point()}
                if "group_step" in state:
                    group["step"] = state.pop("group_step")
                if "proj" in group:  # APOLLO's numbering, also for master weights
                    state.setdefault("seed", place)
                changed = {name: state.pop(f"projector_{name}") for name in CHANGING if f"projector_{name}" in state}
                if changed:
                    state["projector"] = self._projector(group, state)
                    vars(state["projector"]).update(changed)

    def _projector(self, group: dict[str, Any], state: dict[str, Any]) -> Any:
        """A projector as built by the package in the first step."""
        if hasattr(self.optimizer, "_initialize_projector"):  # APOLLO
            return self.optimizer._initialize_projector(group, state)
        settings = ("rank", "update_proj_gap", "scale", "proj_type", "projection_type")
        projector = vars(sys.modules[type(self.optimizer).__module__])["GaLoreProjector"]
        return projector(**{name: group[name] for name in settings if name in group})
