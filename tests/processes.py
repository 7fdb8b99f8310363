"""Calls in several processes of one machine."""

import faulthandler
import gc
import multiprocessing
import os

import torch
import torch.distributed as dist

PATIENCE = 1200  # seconds
multiprocessing.set_forkserver_preload(
    ["pretrain.training.trainer"]
)  # imported once, by the process that all others come from


def _process(rank, function, size, folder, given):
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # a stuck process is an error that shows where
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(function(rank, *given), folder / f"returned-{rank}")
    # A model in DDP that outlives the group lets go of it while it holds the interpreter's lock, for which the
    # group's own threads may be waiting.
    gc.collect()
    dist.destroy_process_group()


def in_processes(size, folder, function, *given):
    """What ``function(rank, *given)`` returns to each of ``size`` processes, which are one gloo group."""
    given = (function, size, folder, given)
    torch.multiprocessing.start_processes(_process, given, nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"returned-{rank}") for rank in range(size)]
