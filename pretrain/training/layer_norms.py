"""``train.log_layers_every``: norms of the gradient, the weight and the update of each linear layer."""

import math

import torch
from torch import Tensor, nn

from models.dtensor import local, sum_parts
from models.grass_linear import GrassLinear
from models.int8_weight import full_weight
from optim.stack import OptimizerStack
from pretrain.training.step_observer import StepObserver


class LayerNorms(StepObserver):
    """Measures the linear layers in every ``every``-th step.

    With P for the parameter that is trained, which is the weight, or under Grass the selected rows:

    grad_norm/<layer>     ‖gradient of P‖, before clipping and other limits
    weight_norm/<layer>   ‖weight‖ after the update; under Grass of the complete weight
    update_ratio/<layer>  ‖P after − P before‖ / ‖P before‖, of the rows that were selected during the step

    All are Frobenius norms of complete matrices, the same on every process: DDP's gradients are means over the
    processes already, and squares of shards are summed. A measured step keeps a copy of P in host memory until P is
    updated. Norms stay on the device until ``take``.

    Args:
        model: sharded already, if the run shards it.
        optim: must not step inside the backward.
        every: at least 1.
    """

    def __init__(self, model: nn.Module, optim: OptimizerStack, every: int):
        self.every, self._under_grass = every, optim.grass is not None
        self._layers: dict[str, nn.Linear | GrassLinear] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, GrassLinear) or (isinstance(module, nn.Linear) and module.weight.requires_grad)
        }
        self._trained = [
            layer.rows if isinstance(layer, GrassLinear) else layer.weight for layer in self._layers.values()
        ]
        self._due = False
        self._gradients: list[Tensor] = []  # sums of squares
        self._before: list[Tensor] = []
        self._squares: Tensor | None = None  # (4, layers) float64: of gradients, weights, updates, parameters before

    def start(self, step: int) -> None:
        """Announce the step (from 1) that comes next."""
        self._due, self._before, self._squares = step % self.every == 0, [], None

    @torch.no_grad()
    def after_backward(self) -> None:
        """Measure the gradients, and keep the parameters."""
        if self._due:
            self._gradients = [_square(local(p.grad)) for p in self._trained if p.grad is not None]
            self._before = [local(p.detach()).to("cpu", copy=True) for p in self._trained]

    def before_refresh(self) -> None:
        """Measure an update of Grass, while its rows are still selected."""
        self._measure_update()

    def after_optimizer(self) -> None:
        """Measure an update of another optimizer. Grass may make several steps for one update."""
        if not self._under_grass:
            self._measure_update()

    def take(self) -> dict[str, float | None]:
        """The metrics of the latest step by name; {} if it was not measured or is already taken. Waits for the device.

        A number that is not finite is None.
        """
        if self._squares is None:
            return {}
        gradients, weights, updates, before = self._squares.sqrt().tolist()
        self._squares = None
        metrics: dict[str, float | None] = {}
        for name, gradient, weight, update, size in zip(self._layers, gradients, weights, updates, before, strict=True):
            metrics[f"grad_norm/{name}"] = gradient if math.isfinite(gradient) else None
            metrics[f"weight_norm/{name}"] = weight if math.isfinite(weight) else None
            ratio = update / size if size else math.nan
            metrics[f"update_ratio/{name}"] = ratio if math.isfinite(ratio) else None
        return metrics

    @torch.no_grad()
    def _measure_update(self) -> None:
        if not self._before:
            return
        weights = [_square(_weight_of(layer)) for layer in self._layers.values()]
        updates, before = [], []
        for p, kept in zip(self._trained, self._before, strict=True):
            now, old = local(p.detach()), kept.to(p.device)
            wide = torch.promote_types(now.dtype, torch.float32)
            updates.append(_square(now.to(wide) - old.to(wide)))
            before.append(_square(old))
        squares = torch.stack([*self._gradients, *weights, *updates, *before])
        self._squares = sum_parts(squares, self._trained[0]).view(4, len(self._layers))
        self._before = []


def _square(tensor: Tensor) -> Tensor:
    """The sum of squares of ``tensor``, float64 ()."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dtype=wide).double().square()


def _weight_of(layer: nn.Linear | GrassLinear) -> Tensor:
    """The weight that the forward of ``layer`` uses, of a sharded layer the local part."""
    if isinstance(layer, GrassLinear) and layer.weight_step is not None:
        rows = layer.rows.detach()
        wide = torch.promote_types(rows.dtype, torch.float32)
        return full_weight(layer.weight, layer.weight_step, rows, layer.index, layer.dim, wide)
    return local(layer.weight.detach())
