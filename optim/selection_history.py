"""A record of the selections of a run: captured share of the gradient, newly selected rows, rows ever selected.

It is on the CPU, where rows are chosen, and is part of a checkpoint.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

NEVER, BEFORE, NOW = 0, 1, 2
UNKNOWN = -1.0  # not NaN: states that are compared bit by bit should be equal to themselves


class SelectionHistory:
    """The latest choice of rows of each layer (a refresh), and the rows that were ever selected.

    rows    by layer (m,) uint8: 0 for rows that were never selected, 1 for rows selected earlier, 2 for selected rows
    latest  by layer (3,) float64: the step of the latest refresh; the share of the gradient's norm in the selected
            rows, √(Σ selected g² / Σ g²) with the scores g, -1 without usable scores; the number of newly selected
            rows. Before the first refresh, all three are -1.

    Args:
        selectable: by layer, the number m of rows (or columns) to choose from.
    """

    def __init__(self, selectable: Mapping[str, int]):
        self.rows = {name: torch.full((m,), NEVER, dtype=torch.uint8) for name, m in selectable.items()}
        self.latest = {name: torch.full((3,), UNKNOWN, dtype=torch.float64) for name in selectable}

    def note(self, name: str, step: int, index: Tensor, scores: Tensor) -> None:
        """Record a refresh of layer ``name`` after update ``step``.

        Args:
            index: the chosen rows (r,) int64 on the CPU; rows may repeat.
            scores: (m,) on the CPU, the scores of all rows, NaN if unknown.
        """
        rows, chosen, squares = self.rows[name].numpy(), np.unique(index.numpy()), scores.double().numpy() ** 2
        changed = np.count_nonzero(rows[chosen] != NOW)
        rows[rows == NOW] = BEFORE
        rows[chosen] = NOW
        with np.errstate(invalid="ignore"):  # scores may be unusable
            captured = np.sqrt(squares[chosen].sum() / squares.sum())
        self.latest[name].numpy()[:] = step, captured if captured >= 0 else UNKNOWN, changed

    def means(self) -> dict[str, float]:
        """Means over the layers, as metrics with the names below. Values that are unknown are left out.

        grass/captured  share of the gradient's norm in the latest selection
        grass/changed   share of newly selected rows in the latest selection
        grass/coverage  share of all rows that were ever selected
        """
        latest = torch.stack(list(self.latest.values()))
        now = torch.stack([(rows == NOW).sum() for rows in self.rows.values()])
        ever = torch.stack([(rows != NEVER).double().mean() for rows in self.rows.values()])
        captured, changed = (values[values >= 0] for values in (latest[:, 1], latest[:, 2] / now))
        means = {"captured": captured, "changed": changed, "coverage": ever}
        return {f"grass/{name}": values.mean().item() for name, values in means.items() if len(values)}

    def by_layer(self, since: int) -> dict[str, dict[str, float | int | None]]:
        """For each layer that chose rows after more than ``since`` updates, its latest choice.

        With ``since`` 0, the initial choice, before the first update, is also included. For each layer:

        captured       share of the gradient's norm in the selected rows; None if unknown
        changed        number of newly selected rows
        selected       number of selected rows
        ever_selected  number of rows ever selected
        rows           number of all rows
        """
        found: dict[str, dict[str, float | int | None]] = {}
        for name, rows in self.rows.items():
            step, captured, changed = self.latest[name].tolist()
            if step > since or since == 0 == step:
                found[name] = {
                    "captured": round(captured, 4) if captured >= 0 else None,
                    "changed": int(changed),
                    "selected": int((rows == NOW).sum()),
                    "ever_selected": int((rows != NEVER).sum()),
                    "rows": len(rows),
                }
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint by name, which are filled in place on resuming."""
        rows = {f"{name}.rows": tensor for name, tensor in self.rows.items()}
        return rows | {f"{name}.latest": tensor for name, tensor in self.latest.items()}
