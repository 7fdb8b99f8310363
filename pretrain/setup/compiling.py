"""torch.compile of the model's blocks, tried on one first: a machine without a working compiler trains without."""

import logging
import time

import torch
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent

from models.activation_checkpointing import checkpoint_blocks
from models.attention import document_layout, resolve_backend
from models.grass_linear import GrassLinear
from models.llama import Llama, rope_tables
from models.precision import DTYPES
from models.recompute import set_lean
from optim.selection import WITH_REPLACEMENT
from pretrain.config.schema import Config, GrassConfig
from pretrain.distributed.world import World
from pretrain.setup.model import outline

logger = logging.getLogger(__name__)


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far, with looking up what an earlier one has left on the disk."""
    return calculate_time_spent().get("total_wall_time", 0.0)


def compile_blocks(config: Config, model: Llama, world: World) -> bool:
    """``torch.compile`` every block in place; without a working compiler say so and leave the model as it is.

    A block like the model's, without its values, makes a forward and a backward of a micro-batch's size first, with
    probes of Grass and without: what is compiled for it serves the model's blocks too, unless they are sharded.
    """
    logger.info("compiling …")
    began = time.perf_counter()
    try:
        _try_block(config, model, world)
    except Exception as error:  # no C++ compiler, no Triton, no writable cache: the toolchain fails in many ways
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason is given")
        logger.warning("torch.compile does not work here, training without it: %s: %s", type(error).__name__, reason)
        torch.compiler.reset()
        return False
    logger.info("compiled in %.0f s", time.perf_counter() - began)
    for layer in model.layers:
        layer.compile()
    if any(getattr(module, "lean", False) for module in model.layers.modules()):
        logger.info("train.lean_activations does nothing in compiled blocks: the compiler chooses what to make again")
    return True


def _try_block(config: Config, model: Llama, world: World) -> None:
    """Compile a block of ``config``: its forward and backward, in each of the states that a run brings it into."""
    train, optim, device = config.train, config.optim, world.device
    block = _block_of(config, device)
    sequences = train.micro_batch_size or train.tokens_per_step // train.seq_len // world.size
    x = torch.zeros(sequences, train.seq_len, config.model.hidden_size, device=device, dtype=DTYPES[train.dtype])
    cos, sin = rope_tables(train.seq_len, model.head_dim, model.rope_theta, like=x)
    backend = resolve_backend(model.attention, device, x.dtype, model.head_dim, train.document_masks)
    layout = None
    if train.document_masks:
        starts = torch.arange(0, (sequences + 1) * train.seq_len, train.seq_len, dtype=torch.int32, device=device)
        layout = document_layout(starts, backend, sequences, train.seq_len)
    for layer in _layers_of(block):
        layer.scaled = isinstance(optim, GrassConfig) and optim.selection.endswith(WITH_REPLACEMENT)  # as Grass sets it
    block.compile()
    probes = isinstance(optim, GrassConfig) and optim.selection != "frozen"
    for probing in (False, True) if probes else (False,):
        for layer in _layers_of(block) if probing else ():
            layer.start_probe(0, optim.sketch_width if optim.score == "sketch" else None)
        y = block(x.requires_grad_(), cos, sin, backend, None, layout)
        wanted: list[Tensor] = [x, *(p for p in block.parameters() if p.requires_grad)]
        wanted += [layer.probe for layer in _layers_of(block) if layer.probe is not None]
        torch.autograd.grad(y, wanted, torch.zeros_like(y))


def _block_of(config: Config, device: torch.device) -> nn.Module:
    """The first block of such a model on ``device``, by itself and with no values of any use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # the model's own outline has said what there is to say
    try:
        block = outline(config).layers[0]
    finally:
        logging.disable(disabled)
    block.to_empty(device=device)
    for layer in _layers_of(block):
        layer.reset()
    checkpoint_blocks([block], config.train.checkpointing)
    set_lean([block], config.train.lean_activations)
    return block


def _layers_of(block: nn.Module) -> list[GrassLinear]:
    return [module for module in block.modules() if isinstance(module, GrassLinear)]
