"""Scores of rows: estimates of their gradient norms, gathered by probes in the backwards before a refresh."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from models.counter_rng import key
from models.dtensor import mean_over_processes
from models.grass_linear import GrassLinear
from models.transfer import upload

SCORES = ("exact", "sketch")


class ScoreProbes:
    """The probes of GrassLinear layers, and the sums of their results over updates.

    A probe scores all m rows (or columns) of a layer by their gradients, during the backwards.

    Attributes:
        gathered: by name of the layer, the sum over the probed updates since its last refresh, float32: squared norms
            of the gradient's rows (m,), or sketches of the gradient (m, k). The same on every process, and part of a
            checkpoint.

    Args:
        layers: the layers by name. The random matrix of a layer's sketch depends on the name.
        seed: the seed of the run.
        sketch_width: k, the number of columns of a sketch; None for exact squared norms.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, layers: Mapping[str, GrassLinear], seed: int, sketch_width: int | None):
        if sketch_width is not None and sketch_width < 1:
            raise ValueError(f"optim.sketch_width={sketch_width} must be at least 1")
        self.layers, self.seed, self.sketch_width = layers, seed, sketch_width
        self.gathered: dict[str, Tensor] = {}

    def start(self, windows: Mapping[str, int]) -> None:
        """Probe some layers from the next forward on.

        Args:
            windows: by name of the layer, the number of its current window, from ``RefreshSchedule.window``. All
                sketches of a layer in one window use the same random matrix, so they can be summed.
        """
        if not windows:
            return
        keys = [key(self.seed, "sketch", window, name) for name, window in windows.items()]
        # One upload for all. Each key begins at a multiple of 16 bytes, or compiled blocks would copy it.
        spaced = upload(torch.tensor([[k, 0] for k in keys]), self.layers[next(iter(windows))].index.device)
        for name, of_layer in zip(windows, spaced[:, 0].unbind(), strict=True):
            self.layers[name].start_probe(of_layer, self.sketch_width)

    def gather(self) -> None:
        """End all probes, combine their results over the processes, and add them to ``gathered``.

        Sketches are averaged. Squared norms are summed and divided by the squared number of processes. Call it in every
        update, so that ``gathered`` is always the same on all processes, and a resumed run adds in the same order.
        """
        probed = {name: layer.stop_probe() for name, layer in self.layers.items() if layer.probe is not None}
        if not probed:
            return
        if dist.is_available() and dist.is_initialized():
            # A sketch is linear in the gradient, squared norms are quadratic.
            mean_over_processes(list(probed.values()), power=1 if self.sketch_width else 2)
        again = [name for name in probed if name in self.gathered]
        if again:
            torch._foreach_add_([self.gathered[name] for name in again], [probed[name] for name in again])
        self.gathered |= {name: probe for name, probe in probed.items() if name not in self.gathered}

    def drop(self) -> None:
        """End all probes and drop their results."""
        for layer in self.layers.values():
            if layer.probe is not None:
                layer.stop_probe()

    def take_norms(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Remove the layers ``names`` from ``gathered``, and estimate the norms of their rows' gradients.

        Returns:
            By name, norms (m,) in float32. A layer that is not in ``gathered`` is left out.
        """
        found = {name: self.gathered.pop(name) for name in names if name in self.gathered}
        if not found:
            return {}
        stacked = torch.cat([*found.values()])
        norms = stacked.sqrt() if stacked.ndim == 1 else stacked.norm(dim=1) / stacked.shape[1] ** 0.5
        return dict(zip(found, norms.split([len(scores) for scores in found.values()]), strict=True))


def require_agreement(indices: list[Tensor], device: torch.device) -> None:
    """Check by a hash that all processes chose the same rows. A single process checks nothing.

    Args:
        indices: the rows of each layer, int64 on the CPU.
        device: where the hash is compared, if the processes cannot communicate between CPUs.

    Raises:
        RuntimeError: the processes chose different rows.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    fingerprint = key(0, *(str(index.tolist()) for index in indices))
    if "cpu:" in str(dist.get_backend_config()):
        device = torch.device("cpu")  # between the hosts, without waiting for a device
    ends = torch.tensor([-fingerprint, fingerprint], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)  # now the negative of the smallest fingerprint, and the largest
    agree = ends.sum() == 0
    if not agree:
        raise RuntimeError("the processes chose different rows: their scores or seeds differ")
