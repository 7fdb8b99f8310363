"""torch.compile of the model's blocks. Without a working compiler, training continues uncompiled."""

import logging
import re
import time

import torch
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent

from models.activation_checkpointing import checkpoint_blocks
from models.attention import document_layout, resolve_backend
from models.grass_linear import GrassLinear
from models.llama import Llama
from models.precision import DTYPES
from models.recompute import set_lean
from optim.selection import WITH_REPLACEMENT
from pretrain.cli.console import warnings_only
from pretrain.config.schema import Config, GrassConfig, micro_batch_size
from pretrain.distributed.world import World
from pretrain.setup.model import outline
from pretrain.setup.optimizer import uses_scores

logger = logging.getLogger(__name__)


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process so far, including look-ups in its cache on disk."""
    return calculate_time_spent().get("total_wall_time", 0.0)


def compile_blocks(config: Config, model: Llama, world: World) -> bool:
    """``torch.compile`` every block in place. Without a working compiler, log the reason and keep the model unchanged.

    First, a separate block of the same shape is compiled by a forward and backward of a micro-batch; if Grass scores
    rows, in a second pass also with scoring. The blocks of the model reuse the compiled code, unless they are sharded.

    Returns:
        Whether the blocks are compiled.
    """
    logger.info("compiling …")
    began = time.perf_counter()
    try:
        _try_block(config, model, world)
    except Exception as error:  # no C++ compiler, no Triton, no writable cache: the toolchain fails in many ways
        reason = failure(error)
        logger.warning("torch.compile does not work on this machine (%s); training continues without it", reason)
        torch.compiler.reset()
        return False
    logger.info("compiled in %.0f s", time.perf_counter() - began)
    for layer in model.layers:
        layer.compile()
    if any(getattr(module, "lean", False) for module in model.layers.modules()):
        logger.info("train.lean_activations has no effect in compiled blocks: the compiler decides what to recompute")
    return True


def failure(error: Exception) -> str:
    """The reason for ``error`` in one line: torch's message, and the first error in the output of the compiler."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not re.fullmatch(r"backend=.* raised:", line)]
    reason = f"{type(error).__name__}: {reasons[0] if reasons else 'no reason is given'}"
    found = next((line for line in reasons[1:] if re.search(r"\berror: |No space left|Read-only|denied", line)), "")
    return f"{reason} ({found})" if found else reason


def _try_block(config: Config, model: Llama, world: World) -> None:
    """Compile forward and backward of one block of ``config``, in each state that occurs in a run."""
    train, optim, device = config.train, config.optim, world.device
    block = _block_of(config, device)
    sequences = micro_batch_size(train, world.size)
    x = torch.zeros(sequences, train.seq_len, config.model.hidden_size, device=device, dtype=DTYPES[train.dtype])
    cos, sin = model.rope_tables(train.seq_len, like=x)
    backend = resolve_backend(model.attention, device, x.dtype, model.head_dim, train.document_masks)
    layout = None
    if train.document_masks:
        starts = torch.arange(0, (sequences + 1) * train.seq_len, train.seq_len, dtype=torch.int32, device=device)
        layout = document_layout(starts, backend, sequences, train.seq_len)
    for layer in _layers_of(block):
        layer.scaled = isinstance(optim, GrassConfig) and optim.selection.endswith(WITH_REPLACEMENT)  # as Grass sets it
    block.compile()
    probes = isinstance(optim, GrassConfig) and optim.selection != "frozen" and uses_scores(optim)
    for probing in (False, True) if probes else (False,):
        for layer in _layers_of(block) if probing else ():
            layer.start_probe(0, optim.sketch_width if optim.score == "sketch" else None)
        y = block(x.requires_grad_(), cos, sin, backend, None, layout)
        wanted: list[Tensor] = [x, *(p for p in block.parameters() if p.requires_grad)]
        wanted += [layer.probe for layer in _layers_of(block) if layer.probe is not None]
        torch.autograd.grad(y, wanted, torch.zeros_like(y))


def _block_of(config: Config, device: torch.device) -> nn.Module:
    """A block like the blocks of the model, on ``device``, with arbitrary values."""
    with warnings_only():  # building the model has logged the same
        block = outline(config).layers[0]
    block.to_empty(device=device)
    for layer in _layers_of(block):
        layer.reset()
    checkpoint_blocks([block], config.train.checkpointing)
    set_lean([block], config.train.lean_activations)
    return block


def _layers_of(block: nn.Module) -> list[GrassLinear]:
    return [module for module in block.modules() if isinstance(module, GrassLinear)]
