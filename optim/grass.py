"""Grass (arXiv 2406.17660) around a stock optimizer: trained rows are written into the weights after every step.

The inner optimizer steps on each layer's small ``rows`` parameter as on any other parameter. After a step, a hook
copies the rows back into the weights (the fold). Every K = ``refresh_every`` steps, it also chooses new rows (a
refresh); the K steps before a refresh are a window. Some choices need scores, which estimate the norms of the rows'
gradients: probes collect scores in the backwards of the last steps of the window.

For bfloat16 rows, the optimizer steps on float32 copies, which are then rounded stochastically. float32 rows of a
bfloat16 weight are its master copies while they are selected, and are rounded stochastically when they leave the
selection.

    layers = convert_linears(model, rank=64)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    grass = Grass(model, optimizer)
    grass.start(lambda: loss_of(first_batch).backward())   # chooses the initial rows; makes no update
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from models.counter_rng import key
from models.grass_linear import GrassLinear
from models.row_updates import FoldGroup, fold_groups, fold_rows, round_values, select_rows, write_weights
from models.transfer import upload
from optim import moments
from optim.composite import with_gradient
from optim.mixed_precision import LOW_PRECISION, Float32Steps
from optim.param_groups import decay_factor
from optim.refresh_schedule import STAGGER, RefreshSchedule, block_of, takes_turns
from optim.scores import SCORES, ScoreProbes, require_agreement
from optim.selection import SELECTIONS, WITH_REPLACEMENT, needs_scores, select_layers
from optim.selection_history import SelectionHistory

Choose = Callable[[list[str], list[Tensor]], list[tuple[Tensor, Tensor | None]]]
"""Arguments: the names of layers, and for each layer the estimated norms (m,) of its rows' gradients, float64, NaN
where it was not probed. Result: for each layer the selected rows (r,) int64, ascending, and ρ (r,) float32 or None
where it is 1. All are on the CPU."""


class Grass:
    """Hooks on the steps of ``optimizer`` that write trained rows into the weights and choose new rows every K steps.

    The defaults are those of conf/optim/grass.yaml.

    Args:
        model: holds the GrassLinear layers. All random numbers depend on the names of the layers.
        optimizer: any torch.optim.Optimizer that holds the layers' ``rows``.
        refresh_every: K, the updates between two choices of a layer's rows (a refresh).
        selection: how rows are chosen, a name from optim.selection.
        score: "sketch" estimates the row norms of the gradient summed over micro-batches. "exact" computes the complete
            gradient of each micro-batch and sums its squared row norms: it costs more, and noise does not cancel.
        sketch_width: k, columns of the sketch; the relative error of a norm is about 1/√(2k).
        probe_steps: the number of updates before a refresh whose gradients are scored; values above K count as K.
        stagger: refresh the model's blocks in turn, spread over K updates, instead of all at once. "auto" does so if a
            scored layer selects columns, because such a layer keeps its complete input in the updates that are scored,
            and only in these. With ``refresh_warmup``, "auto" means False.
        state_at_refresh: "carry" keeps the optimizer's state of rows that stay, "reset" drops all, see optim.moments.
        new_second_moment: with "carry", where the second moments of new rows start: "score", "mean" or "zero".
        refresh_warmup: updates over which the rate of the rows warms up again after a refresh; 0 for none.
        block_by_block: step on low-precision rows one block of the model at a time (on a GPU a few), so that only their
            float32 copies exist. The optimizer's step on a parameter must not depend on other parameters.
        seed: of the choice of rows, the sketches and the rounding.

    Attributes:
        choose: chooses the rows at a refresh. A function that replaces it must choose the same rows on all processes.
        scored: whether the selection needs scores. If not, layers are scored only if second moments start from scores.
        steps: updates so far, with skipped ones.

    Raises:
        ValueError: an unknown name; ``refresh_every``, ``probe_steps`` or ``sketch_width`` below 1; a model without
            GrassLinear layers; an optimizer that does not hold their rows; or ``stagger=True`` with ``refresh_warmup``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        refresh_every: int = 50,
        selection: str = "cyclic",
        score: str = "sketch",
        sketch_width: int = 16,
        probe_steps: int = 2,
        stagger: bool | str = "auto",
        state_at_refresh: str = "carry",
        new_second_moment: str = "score",
        refresh_warmup: int = 0,
        block_by_block: bool = False,
        seed: int = 0,
    ):
        _require_known("selection", selection, SELECTIONS)
        _require_known("score", score, SCORES)
        _require_known("stagger", stagger, STAGGER)
        self.model, self.optimizer, self.selection, self.seed = model, optimizer, selection, seed
        self.layers = _layers_of(model, optimizer)
        self.scored = needs_scores(selection)
        self._names = {layer.rows: name for name, layer in self.layers.items()}
        self._state = moments.StateAtRefresh(
            optimizer, state_at_refresh, new_second_moment, min(probe_steps, refresh_every)
        )
        probed = self.layers.values() if self.scored or self._state.may_use_scores(self._names) else ()
        self.schedule = RefreshSchedule(
            self.layers, refresh_every, probe_steps, takes_turns(stagger, probed, refresh_warmup), refresh_warmup,
            frozen=selection == "frozen",
        )  # fmt: skip
        self.probes = ScoreProbes(self.layers, seed, sketch_width if score == "sketch" else None)
        self.history = SelectionHistory({name: layer.selectable for name, layer in self.layers.items()})
        self.choose: Choose = self._choose_by_scores
        self.steps = 0
        self.stepping: dict[str, GrassLinear] = {}  # the layers whose rows the running step changes
        self.is_partial_step = False  # whether the running step is one of several that make an update
        self._before: dict[GrassLinear, Tensor] = {}  # weighted rows before the running step
        self._refresh_hooks: tuple[list[Callable[[], object]], list[Callable[[], object]]] = ([], [])
        self._block_by_block, self._weighted = block_by_block, selection.endswith(WITH_REPLACEMENT)
        low = {rows: block_of(name) for rows, name in self._names.items() if rows.dtype in LOW_PRECISION}
        self._float32_steps = Float32Steps(optimizer, low, self._round_state)
        for layer in self.layers.values():
            layer.scaled = self._weighted
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def start(self, backward: Callable[[], object]) -> None:
        """Choose the initial rows from one gradient, computed by ``backward`` and then dropped.

        A selection that needs no scores does not call ``backward``. Otherwise every layer is scored, and layers that
        select columns keep their complete inputs: if memory is tight, use activation checkpointing in ``backward``.
        """
        if self.scored:
            self.probes.start(dict.fromkeys(self.layers, 0))
            backward()
            self.model.zero_grad(set_to_none=True)
            self.probes.gather()
        self._refresh(list(self.layers))
        self._start_probes()

    def resume(self, steps: int) -> None:
        """Continue after ``steps`` updates, with model, optimizer and ``tensors()`` loaded. For ``OptimizerStack``.

        In your own training loop, use ``load_state_dict``.
        """
        self.steps = steps
        self._start_probes()

    def state_dict(self) -> dict[str, Any]:
        """The part of the state that is not in the model's or the optimizer's state_dict. Save all three.

        ``{"steps": int, "tensors": {name: Tensor}}``. As in torch, the tensors are references, not copies.
        """
        return {"steps": self.steps, "tensors": self.tensors()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue exactly from a ``state_dict()``.

        Call it instead of ``start``, after loading the model and the optimizer. The model has to be converted, and
        Grass created, with the arguments of the saved run.

        Raises:
            ValueError: the state belongs to other layers.
        """
        tensors, history = dict(state_dict["tensors"]), self.history.tensors()
        gathered = {name: tensors.pop(f"grass.{name}") for name in self.layers if f"grass.{name}" in tensors}
        ours = {f"history.{name}": tensor for name, tensor in history.items()}
        if unlike := sorted(
            name for name in ours.keys() | tensors.keys() if _shape(ours, name) != _shape(tensors, name)
        ):
            raise ValueError(
                f"the state of Grass has other layers than the model ({unlike[0]}); convert the model with the same "
                "patterns and sides"
            )
        self.probes.drop()
        self.probes.gathered = {n: t.to(self.layers[n].weight.device, copy=True) for n, t in gathered.items()}
        for name, tensor in ours.items():
            tensor.copy_(tensors[name])
        self.resume(state_dict["steps"])

    def skip_update(self) -> None:
        """Count an update that is not made. Its gradient enters no score, and no later refresh is delayed."""
        self.probes.drop()
        self._end_update()

    @contextmanager
    def update_in_parts(self) -> Iterator[None]:
        """A context in which all steps of the optimizer make one update, which ends with the context.

        Each step writes the rows that it changed into the weights. After an exception, the update is not counted.
        """
        with self._partial_steps():
            yield
        self._end_update()

    def rate_factor(self) -> float:
        """The factor on the rows' learning rate in the coming update; below 1 in the warm-up after a refresh."""
        return self.schedule.rate_factor(self.steps)

    def register_refresh_pre_hook(self, hook: Callable[[], object]) -> None:
        """Call ``hook`` at the end of every update, before scores are gathered and rows chosen, if any are due."""
        self._refresh_hooks[0].append(hook)

    def register_refresh_post_hook(self, hook: Callable[[], object]) -> None:
        """Call ``hook`` at the end of every update, after rows are chosen and the next probes started."""
        self._refresh_hooks[1].append(hook)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to save and to fill in place on resuming: scores grass.<layer>, history.<layer>.<rows or latest>."""
        tensors = {f"grass.{name}": gathered for name, gathered in self.probes.gathered.items()}
        return tensors | {f"history.{name}": tensor for name, tensor in self.history.tensors().items()}

    def make_room(self, stored: Mapping[str, Any]) -> None:
        """Create, unfilled, scores that ``stored`` has and ``tensors()`` lacks, as in ``OptimizerStack.make_room``."""
        for name, layer in self.layers.items():
            if (entry := stored.get(f"grass.{name}")) is not None:
                self.probes.gathered[name] = torch.empty(entry.size, device=layer.weight.device)

    # The step and the fold.

    def _before_step(self, *_) -> None:
        if self._block_by_block:
            with self._partial_steps():
                self._float32_steps.step_on_other_blocks()
        stepped_on = with_gradient(self.optimizer)
        self.stepping = {name: self.layers[name] for rows, name in self._names.items() if rows in stepped_on}
        weighted = self.stepping.values() if self._weighted else ()
        self._before = {layer: layer.rows.detach().clone() for layer in weighted}
        self._float32_steps.widen()

    def _after_step(self, *_) -> None:
        self._fold(self._float32_steps.restore())
        if not self.is_partial_step:
            self._end_update()

    def _fold(self, copies: dict[nn.Parameter, nn.Parameter]) -> None:
        """Write the step on the rows of ``stepping`` into the weights; ``copies`` hold it for low-precision rows."""
        layers, stepped, keys = list(self.stepping.values()), list[Tensor | None](), list[int]()
        if not copies and not self._before:  # the usual case
            write_weights(self._groups if len(layers) == len(self.layers) else fold_groups(layers))
            return
        groups = self.optimizer.param_groups if self._before else []
        decay = {p: decay_factor(self.optimizer, group) for group in groups for p in group["params"]}
        for name, layer in self.stepping.items():
            after: Tensor | None = copies.pop(layer.rows, None)
            if (before := self._before.pop(layer, None)) is not None:
                after = layer.stepped_draws(before, decay[layer.rows], layer.rows if after is None else after)
            stepped.append(after)
            keys.append(0 if after is None else self._rounding_key(name))
        fold_rows(layers, stepped, keys)

    @cached_property
    def _groups(self) -> list[FoldGroup]:
        """The groups of all layers, looked up once: for hundreds of layers it takes as long as the fold itself."""
        return fold_groups(list(self.layers.values()))

    def _round_state(self, rows: Sequence[nn.Parameter], state: str, values: Sequence[Tensor]) -> list[Tensor]:
        names = [self._names[p] for p in rows]
        keys = [self._rounding_key(name, state) for name in names]
        return round_values([self.layers[name] for name in names], values, rows[0].dtype, keys)

    def _rounding_key(self, name: str, *state: str) -> int:
        return key(self.seed, "round", self.steps, name, *state)

    @contextmanager
    def _partial_steps(self) -> Iterator[None]:
        before, self.is_partial_step = self.is_partial_step, True
        try:
            yield
        finally:
            self.is_partial_step = before

    # The refresh.

    def _end_update(self) -> None:
        """Gather the scores of the update just made, and refresh the layers that are due."""
        before, after = self._refresh_hooks
        for hook in before:
            hook()
        self.steps += 1
        self.probes.gather()
        self._refresh(self.schedule.due(self.steps))
        self._start_probes()
        for hook in after:
            hook()

    def _start_probes(self) -> None:
        if self.scored or self._state.uses_scores(self._names):
            self.probes.start({n: self.schedule.window(n, self.steps) for n in self.schedule.probing(self.steps)})

    def _refresh(self, names: list[str]) -> None:
        """Give the layers ``names`` the rows of their next window, the same on every process.

        Layers that have no scores, though the selection needs them, keep their rows.
        """
        if self.scored:
            names = [name for name in names if name in self.probes.gathered]
        if not names:
            return
        norms, device = self.probes.take_norms(names), self.layers[names[0]].index.device
        chosen = self._choose_rows(names, norms, device)
        index = upload(torch.cat([index for index, _ in chosen]), device).split([len(index) for index, _ in chosen])
        scales = [scale if scale is None else upload(scale, device) for _, scale in chosen]
        layers, keys = [self.layers[name] for name in names], [self._rounding_key(name) for name in names]
        for numbers, change in select_rows(layers, index, scales, keys):
            self._state.update([layers[n] for n in numbers], change, [norms.get(names[n]) for n in numbers])

    def _choose_rows(
        self, names: list[str], norms: Mapping[str, Tensor], device: torch.device
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Call ``choose``, compare the result over the processes, and record it in the history."""
        # One transfer for all layers, because each transfer waits for the device.
        on_cpu = torch.cat([*norms.values()]).cpu().double().split([len(n) for n in norms.values()]) if norms else ()
        known = dict(zip(norms, on_cpu, strict=True))
        scores = [known.get(n, torch.full((self.layers[n].selectable,), torch.nan).double()) for n in names]
        chosen = self.choose(names, scores)
        require_agreement([index for index, _ in chosen], device)
        for name, (index, _), of_layer in zip(names, chosen, scores, strict=True):
            self.history.note(name, self.steps, index, of_layer)
        return chosen

    def _choose_by_scores(self, names: list[str], norms: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        scores, layers = dict(zip(names, norms, strict=True)), {name: self.layers[name] for name in names}
        windows = {name: self.schedule.window(name, self.steps) for name in names}
        selected = select_layers(self.selection, layers, scores, windows, self.seed, self.steps)
        return [selected[name][:2] for name in names]


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _require_known(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        raise ValueError(f"optim.{option}={value} is unknown; choose from {', '.join(map(str, known))}")


def _layers_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, GrassLinear]:
    """The GrassLinear layers of ``model`` by name; raises ValueError if none or if the optimizer does not hold one."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GrassLinear)}
    if not layers:
        raise ValueError("the model has no GrassLinear layer; call convert_linears first")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if absent := [name for name, layer in layers.items() if layer.rows not in held]:
        raise ValueError(
            f"the optimizer does not step on the rows of {absent[0]}; build it after convert_linears. With master "
            "weights, the rows themselves must be float32 (optim.state_dtype=float32)"
        )
    return layers
