"""Which kernels attention runs on, how often in a step, whether a block is one graph, and whether a step waits.

run.sh python attention.py     prints a line of JSON for each case
"""

import json
import logging

import torch
from torch._dynamo.utils import counters
from torch.profiler import profile

from models import attention
from models.activation_checkpointing import checkpoint_blocks
from models.llama import Llama

LAYERS, ROWS, TOKENS, VOCAB = 2, 2, 256, 512
KERNELS = ("flash_attention_forward", "efficient_attention_forward", "scaled_dot_product_attention_math")


def model(dtype: torch.dtype, mode: str, compiled: bool) -> Llama:
    with torch.device("cuda"):
        made = Llama(
            vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=TOKENS,
        ).to_dtype(dtype)  # fmt: skip
    checkpoint_blocks(made.layers, mode)
    for layer in made.layers if compiled else ():
        layer.compile(fullgraph=True)
    return made


def step(made: Llama, documents: int) -> None:
    """Forward and backward of rows with so many documents beside those that every row begins; 0 keeps none apart."""
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS))
    begins = torch.cat([torch.arange(ROWS + 1) * TOKENS, torch.randint(0, ROWS * TOKENS, (documents,))]).unique().int()
    batch = (ids, ids, begins) if documents else (ids, ids)
    made(*(x.pin_memory().to("cuda", non_blocking=True) for x in batch)).backward()


def case(dtype: torch.dtype, mode: str, compiled: bool, apart: bool) -> dict:
    torch._dynamo.reset()
    counters.clear()
    attention._logged.clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    attention.log.addHandler(handler)
    attention.log.setLevel(logging.INFO)
    made = model(dtype, mode, compiled)
    for documents in (1, 5, 40):
        step(made, documents if apart else 0)
        torch.cuda.set_sync_debug_mode("error")  # of those to come
    with profile() as profiled:
        step(made, 17 if apart else 0)
    torch.cuda.set_sync_debug_mode("default")
    attention.log.removeHandler(handler)
    counts = {event.key.removeprefix("aten::_"): event.count // LAYERS for event in profiled.key_averages()}
    calls = {name: count for name, count in counts.items() if name in KERNELS}
    return {"said": said, "calls": calls, "graphs": counters["stats"]["unique_graphs"]}


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        for apart in (True, False):
            for compiled in (False, True):
                for mode in ("none", "full", "selective"):
                    names = {"dtype": str(dtype), "apart": apart, "compiled": compiled, "mode": mode}
                    print(json.dumps(names | case(dtype, mode, compiled, apart)), flush=True)
