"""Two saves by a process whose device is the second of two; prints on which it has made a context.

NULL_GPUS=2 tests/null_gpu/run.sh python tests/null_gpu/saves.py FOLDER
"""

import sys
from pathlib import Path

import torch
from counts import contexts

from pretrain.checkpoint.saver import Saver
from pretrain.distributed.world import World

world = World(0, 1, torch.device("cuda", 1))
torch.cuda.set_device(world.device)
saver = Saver(Path(sys.argv[1]), world)
for step in (1, 2):
    saver.save(step, {f"model.{i}": torch.zeros(64, 64, device=world.device) for i in range(3)}, {"step": step})
saver.finish()
print("saved", *sorted(path.name for path in Path(sys.argv[1]).iterdir()))
print("contexts on", contexts())
