"""Time per generated token at sequence lengths that occur for the first time, and at the same lengths again.

The first time is slower if a kernel is planned for each length.
"""

import time
from statistics import median

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.training import BYTES, TINY, TrainingRun, settings
from models.kv_cache import KVCache
from models.llama import Llama

PROMPT, TOKENS = 64, 32
ROUNDS = ("lengths never seen", "the same lengths again")


def run(bench: Bench, case: str) -> None:
    shape = TINY if bench.dry else [*BYTES, "model=llama_350m", "model.num_hidden_layers=4"]
    model = TrainingRun(settings([*shape, "optim=adamw", "train.dtype=bfloat16"]), bench.device).model
    _generate(bench, model, prompt=PROMPT // 2)  # other lengths: loads everything that is loaded once
    for lengths in ROUNDS:
        with bench.row(lengths=lengths, tokens=TOKENS) as row:
            row["ms_per_token"] = _generate(bench, model, PROMPT)


@torch.no_grad()
def _generate(bench: Bench, model: Llama, prompt: int) -> float:
    """Return the median milliseconds per token after ``prompt`` tokens, waiting for each token as sampling does."""
    caches = [KVCache(model.max_position_embeddings) for _ in model.layers]
    model(torch.zeros(1, prompt, dtype=torch.int64, device=bench.device), caches=caches)
    token, times = torch.zeros(1, 1, dtype=torch.int64, device=bench.device), []
    for _ in range(TOKENS):
        bench.synchronize()
        began = time.perf_counter()
        model(token, caches=caches)
        bench.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return median(times)
