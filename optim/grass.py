"""Grass around a stock optimizer: fold every step, choose new rows every so often. No optimizer subclass, only hooks.

The inner optimizer steps on each layer's small ``rows`` parameter like on any other. After its step a hook folds the
rows into the weights, and every ``refresh_every`` steps chooses the rows of the next window, so that they are in place
before the forward that uses them. What the choice needs is gathered by the backward of the steps just before it.
bfloat16 rows are stepped on in float32 and rounded stochastically; float32 rows of a bfloat16 weight are its master
copies for as long as they are selected, and rounded stochastically when they leave.

    layers = convert_linears(model, rank=64)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    grass = Grass(model, optimizer, refresh_every=200)
    grass.start(lambda: loss_of(first_batch).backward())   # rows for the first window; makes no update
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.counter_rng import key
from models.dtensor import local
from models.grass_linear import GrassLinear
from models.row_updates import Change, fold_rows, round_values, select_rows
from models.transfer import upload
from optim import moments
from optim.composite import only
from optim.mixed_precision import lend, take_back
from optim.param_groups import decay_factor
from optim.refresh_schedule import block_of, turn_offsets
from optim.scores import SCORES, _require_agreement
from optim.selection import SELECTIONS, WITH_REPLACEMENT, select_together
from optim.selection_history import SelectionHistory

logger = logging.getLogger(__name__)


class Grass:
    """The fold and the refresh of every GrassLinear of ``model``, attached to ``optimizer`` by step hooks.

    Args:
        model: holds the GrassLinear layers; their names are part of every draw's key.
        optimizer: any torch.optim.Optimizer that holds the layers' ``rows``.
        refresh_every: K, the updates between two choices of a layer's rows.
        selection: a name of optim.selection.
        score: "exact" forms each layer's gradient once and sums the squared row norms of micro-batches and processes,
            which is not the norm of their sum; "sketch" estimates the norms of the true sum, at a fraction of the cost.
        sketch_width: k, columns of the sketch; the relative error of a norm is about 1/√(2k).
        probe_steps: how many of the last steps of a window feed the score.
        stagger: refresh the model's blocks in turn, spread over the window, instead of all at once. "auto" does where a
            layer selects columns: the probe of such a layer keeps all of its input, which its other steps do not.
        state_at_refresh: what happens to moments, a name of optim.moments.
        new_second_moment: where the second moments of new rows start when moments are carried, also named there.
        refresh_warmup: updates over which the rate of the rows warms up again after a refresh; 0 for none.
        block_by_block: step on low-precision rows in a step for each of the model's blocks, so that the float32
            stand-ins of one exist at a time. What the optimizer does to a parameter must depend on that one alone.
        seed: the run's seed.

    Raises:
        ValueError: an unknown name or a number below one, a model without GrassLinear layers, an optimizer that does
            not hold their rows, or stagger with refresh_warmup (there is no common refresh).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        refresh_every: int,
        selection: str = "top_r",
        score: str = "exact",
        sketch_width: int = 16,
        probe_steps: int = 1,
        stagger: bool | str = False,
        state_at_refresh: str = "reset",
        new_second_moment: str = "mean",
        refresh_warmup: int = 0,
        block_by_block: bool = False,
        seed: int = 0,
    ):
        for option, value, known in (
            ("selection", selection, SELECTIONS),
            ("score", score, SCORES),
            ("stagger", stagger, (True, False, "auto")),
            ("state_at_refresh", state_at_refresh, moments.POLICIES),
            ("new_second_moment", new_second_moment, moments.NEW_SECOND_MOMENTS),
        ):
            if value not in known:
                raise ValueError(f"optim.{option}={value} is unknown; choose from {', '.join(map(str, known))}")
        if min(refresh_every, sketch_width, probe_steps) < 1:
            raise ValueError("optim.refresh_every, sketch_width and probe_steps must be at least 1")
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, GrassLinear)}
        if not self.layers:
            raise ValueError("the model has no GrassLinear layer; call convert_linears first")
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if strangers := [name for name, layer in self.layers.items() if layer.rows not in held]:
            raise ValueError(
                f"the optimizer does not step on the rows of {strangers[0]}; build it after convert_linears, and with "
                "master weights keep the rows in float32 (optim.state_dtype=float32)"
            )
        columns = sum(layer.dim == 1 for layer in self.layers.values())
        stagger = columns > 0 if stagger == "auto" else bool(stagger)
        if columns and not stagger:
            logger.info(
                "all %d layers that select columns keep their whole inputs in a probed step; with optim.stagger=auto "
                "they take turns",
                columns,
            )
        if stagger and refresh_warmup:
            raise ValueError("optim.refresh_warmup needs a common refresh; set it to 0 or optim.stagger=false")
        self.model, self.optimizer = model, optimizer
        self.refresh_every, self.selection, self.seed = refresh_every, selection, seed
        self.sketch_width = sketch_width if score == "sketch" else None
        self.probe_steps = min(probe_steps, refresh_every)
        self.state_at_refresh, self.new_second_moment = state_at_refresh, new_second_moment
        self.refresh_warmup, self.block_by_block = refresh_warmup, block_by_block
        self.steps = 0
        self.in_update = False  # while set, a step of the optimizer is one on some of the parameters, with more to come
        # Probes of the window so far, averaged over processes; part of a checkpoint.
        self.gathered: dict[str, Tensor] = {}
        self.history = SelectionHistory({name: layer.selectable for name, layer in self.layers.items()})
        self.offsets = turn_offsets(list(self.layers), refresh_every) if stagger else dict.fromkeys(self.layers, 0)
        self.stepping: dict[str, GrassLinear] = {}  # the layers whose rows the step at work changes
        self._before: dict[GrassLinear, Tensor] = {}
        self._said_reset = False
        # Rows that are stepped on in float32 and kept, moments and all, in less.
        low = (torch.bfloat16, torch.float16)
        self._low_precision = {layer.rows: name for name, layer in self.layers.items() if layer.rows.dtype in low}
        self._stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        self._rest = ExitStack()  # open while the step at work is on what no step of a block was made on
        for layer in self.layers.values():
            layer.scaled = selection.endswith(WITH_REPLACEMENT)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def start(self, backward: Callable[[], object]) -> None:
        """Choose the rows of the first window from one gradient, computed by ``backward`` and then dropped.

        Every layer is probed in it, of which one that selects columns keeps its whole input: where memory is tight
        ``backward`` should keep little else, by activation checkpointing.
        """
        self._start_probes(self.layers)
        backward()
        self.model.zero_grad(set_to_none=True)
        self._gather()
        self._refresh(list(self.layers))
        self._start_probes(self._probing)

    def resume(self, steps: int) -> None:
        """Go on after ``steps`` updates; layers, moments, ``gathered`` and ``history`` are loaded from a checkpoint."""
        self.steps = steps
        self._start_probes(self._probing)

    def skip_update(self) -> None:
        """Count an update that is not made: its gradient goes into no score, and refreshes keep their turns."""
        for layer in self.layers.values():
            if layer.probe is not None:
                layer.stop_probe()
        self.end_update()

    def rate_factor(self) -> float:
        """What the warm-up after a refresh makes of the rows' learning rate in the coming update."""
        since = self.steps % self.refresh_every
        return min(1.0, (since + 1) / self.refresh_warmup) if self.refresh_warmup else 1.0

    # The hooks.

    def _before_step(self, *_) -> None:
        if self.block_by_block:
            self._step_on_blocks()
        held = self._held()
        self.stepping = {name: layer for name, layer in self.layers.items() if layer.rows in held}
        self._before = {layer: layer.rows.detach().clone() for layer in self.stepping.values() if layer.scaled}
        low_precision = {layer.rows for layer in self.stepping.values()} & self._low_precision.keys()
        self._stand_ins = lend(self.optimizer, low_precision)

    def _held(self) -> set[nn.Parameter]:
        """What the step at work changes."""
        return {p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None}

    def _step_on_blocks(self) -> None:
        """Make the steps on the low-precision rows of all blocks but the last, and leave the step at work the rest."""
        held, blocks = self._held(), dict[str, list[nn.Parameter]]()
        for rows, name in self._low_precision.items():
            if rows in held:
                blocks.setdefault(block_of(name), []).append(rows)
        *others, _ = blocks.values() or [[]]
        if not others:
            return  # also in the steps that are made here
        in_update, self.in_update = self.in_update, True
        for rows_of_one in others:
            with only(self.optimizer, set(rows_of_one)):
                self.optimizer.step()
            held.difference_update(rows_of_one)
        self.in_update = in_update
        self._rest.enter_context(only(self.optimizer, held))

    def _after_step(self, *_) -> None:
        take_back(self.optimizer, self._stand_ins, self._round_state)
        self._rest.close()
        self._fold()
        if not self.in_update:
            self.end_update()

    def _fold(self) -> None:
        """Write the step on the rows of ``stepping`` into the weights, and let go of what it was made with."""
        decay = self._decay_factors() if self._before else {}
        layers, stepped, keys = list(self.stepping.values()), list[Tensor | None](), list[int]()
        for name, layer in self.stepping.items():
            after: Tensor | None = self._stand_ins.pop(layer.rows, None)
            if (before := self._before.pop(layer, None)) is not None:
                after = layer.stepped_draws(before, decay[layer.rows], layer.rows if after is None else after)
            stepped.append(after)
            keys.append(0 if after is None else self._rounding_key(name))
        fold_rows(layers, stepped, keys)

    def end_update(self) -> None:
        """Gather the scores of the update just made, and refresh the layers whose turn it is."""
        self.steps += 1
        self._gather()
        self._refresh([name for name in self.layers if self._steps_to_refresh(name) == self.refresh_every])
        self._start_probes(self._probing)

    def _rounding_key(self, name: str, *what: str) -> int:
        return key(self.seed, "round", self.steps, name, *what)

    def _round_state(self, rows: Sequence[nn.Parameter], what: str, values: Sequence[Tensor]) -> list[Tensor]:
        names = [self._low_precision[p] for p in rows]
        keys = [self._rounding_key(name, what) for name in names]
        return round_values([self.layers[name] for name in names], values, rows[0].dtype, keys)

    def _steps_to_refresh(self, name: str) -> int:
        """Updates until the rows of ``name`` are chosen next: 1 … K, K right after (or at) a refresh."""
        return self.refresh_every - (self.steps + self.offsets[name]) % self.refresh_every

    def _decay_factors(self) -> dict[Tensor, float]:
        """What decoupled weight decay multiplied each parameter by in the step just made."""
        groups = self.optimizer.param_groups
        return {p: decay_factor(self.optimizer, group) for group in groups for p in group["params"]}

    # Probing: the backward of the steps before a refresh gathers what the scores need.

    @property
    def _probing(self) -> list[str]:
        """The layers whose coming backward feeds their score."""
        if self.selection == "frozen":
            return []
        return [name for name in self.layers if self._steps_to_refresh(name) <= self.probe_steps]

    def _start_probes(self, names: Iterable[str]) -> None:
        names = list(names)
        if not names:
            return
        windows = [(self.steps + self.offsets[name]) // self.refresh_every for name in names]
        keys = [key(self.seed, "sketch", window, name) for window, name in zip(windows, names, strict=True)]
        # One upload for all. Each key begins at a multiple of 16 bytes, or compiled blocks would copy it.
        spaced = upload(torch.tensor([[k, 0] for k in keys]), self.layers[names[0]].index.device)
        for name, of_layer in zip(names, spaced[:, 0].unbind(), strict=True):
            self.layers[name].start_probe(of_layer, self.sketch_width)

    def _gather(self) -> None:
        """End the probes of the step just made and add them, summed over processes, to what was gathered before.

        Summed every step, so that at any step all processes hold the same, and a resumed run adds in the same order.
        """
        probed = {name: layer.stop_probe() for name, layer in self.layers.items() if layer.probe is not None}
        if not probed:
            return
        if dist.is_available() and dist.is_initialized():
            self._average(list(probed.values()))
        again = [name for name in probed if name in self.gathered]
        if again:
            torch._foreach_add_([self.gathered[name] for name in again], [probed[name] for name in again])
        self.gathered |= {name: probe for name, probe in probed.items() if name not in self.gathered}

    def _average(self, probed: list[Tensor]) -> None:
        """Make ``probed`` that of the mean gradient over the processes, in place."""
        flat = torch.cat([p.flatten() for p in probed])
        dist.all_reduce(flat)
        # A sketch is linear in the gradient, squared norms are quadratic.
        flat /= dist.get_world_size() ** (1 if self.sketch_width else 2)
        parts = flat.split([p.numel() for p in probed])
        torch._foreach_copy_(probed, [part.view_as(p) for part, p in zip(parts, probed, strict=True)])

    # The refresh.

    def _refresh(self, names: list[str]) -> None:
        """Give the layers the rows of their next window, the same ones on every process."""
        names = [name for name in names if name in self.gathered]
        if not names:
            return
        norms = self._norms([self.gathered.pop(name) for name in names])
        chosen = self.choose(names, norms)
        device = norms[0].device
        index = upload(torch.cat([index for index, _ in chosen]), device).split([len(index) for index, _ in chosen])
        scales = [scale if scale is None else upload(scale, device) for _, scale in chosen]
        layers, keys = [self.layers[name] for name in names], [self._rounding_key(name) for name in names]
        for numbers, change in select_rows(layers, index, scales, keys):
            self._change_state([layers[n] for n in numbers], change, torch.stack([norms[n] for n in numbers]))

    def choose(self, names: list[str], norms: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """What the host decides: the sorted index (r,) of each layer and its ρ (r,) or None, from row norms (m,).

        Layers that share an index are chosen for by the norms of their gradients put together.
        """
        # One wait for the device, not one a layer.
        on_cpu = torch.cat(norms).cpu().double().split([n.numel() for n in norms])
        scores = dict(zip(names, on_cpu, strict=True))
        sharing: dict[Any, list[str]] = {}
        for name in names:
            sharing.setdefault(self.layers[name].shared or name, []).append(name)
        groups = list(sharing.values())
        joint = [scores[g[0]] if len(g) == 1 else torch.stack([scores[n] for n in g]).norm(dim=0) for g in groups]
        ranks = [self.layers[group[0]].rank for group in groups]
        seeds = [key(self.seed, "select", self.steps, group[0]) for group in groups]
        chosen = {}
        for group, (index, scale, usable) in zip(
            groups, select_together(self.selection, joint, ranks, seeds), strict=True
        ):
            if not usable:
                logger.warning("step %d: %s has no usable row scores; drew rows uniformly", self.steps, group[0])
            for name in group:
                self.history.note(name, self.steps, index, scores[name])
                chosen[name] = index, scale
        _require_agreement([index for index, _ in chosen.values()], norms[0].device)
        return [chosen[name] for name in names]

    def _norms(self, gathered: list[Tensor]) -> list[Tensor]:
        """Row norms (m,) of each layer, from squared norms (m,) or from a sketch (m, k)."""
        together = torch.cat(gathered)
        norms = together.sqrt() if together.ndim == 1 else together.norm(dim=1) / together.shape[1] ** 0.5
        return list(norms.split([len(scores) for scores in gathered]))

    def _change_state(self, layers: list[GrassLinear], change: Change, norms: Tensor) -> None:
        """Carry the optimizer's state over a change of rows of layers that are alike, or drop it; norms (layers, m)."""
        # A shard of the rows and of their state has all of the selected dimension: each is carried by itself.
        held = [self.optimizer.state.get(layer.rows, {}) for layer in layers]
        states = [{k: local(t) if torch.is_tensor(t) else t for k, t in state.items()} for state in held]
        having = [number for number, state in enumerate(states) if state]
        if not having:
            return
        state, shape = states[having[0]], local(layers[0].rows).shape
        carried = self.state_at_refresh == "carry"
        if carried and not all(moments.can_be_carried(states[n], shape) for n in having):
            self._say_reset(state)
            carried = False
        if not carried:
            for n in having:
                del self.optimizer.state[layers[n].rows]
            return
        # The square of a sum over probe_steps gradients grows like their number: most of a gradient is noise.
        elements = self.probe_steps * layers[0].weight.numel() // layers[0].selectable
        mean_square = norms.gather(1, change.new_index).square() / elements
        alike = len({tuple(states[n]) for n in having}) == 1
        for some in [having] if alike else [[n] for n in having]:
            own = change if len(some) == len(layers) else change.of(some)
            score = mean_square if own is change else torch.stack([mean_square[n] for n in some])
            moments.carry([states[n] for n in some], own, self.new_second_moment, score)

    def _say_reset(self, state: dict[str, Any]) -> None:
        if not self._said_reset:
            logger.warning(
                "the state of %s (%s) is not all moments of single rows and cannot be carried: every refresh resets it",
                *(type(self.optimizer).__name__, ", ".join(state)),
            )
        self._said_reset = True
