"""Kill a tiny run again and again at random moments, and compare its end with that of a run that was not killed.

    python -m tests.kills 200 /tmp/kills 2      # kills, folder, seed

prints the places that the kills hit, as JSON, and fails when a run differs or a kill costs too many steps.

Each life of a run is a fork of this process, which has imported torch and prepared the data. In the fork the disk and
the steps are slowed down, so that many kills hit a save. It notes where it is in memory that outlives it.
"""

import json
import logging
import mmap
import os
import random
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import filesystem

from data import atomic as files
from pretrain.checkpoint import saver
from pretrain.checkpoint.directory import latest, newest_good
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.training import trainer
from tests.parallel_runs import TINY

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 16, 4
RUN = [
    *TINY, f"train.steps={STEPS}", "train.dtype=float32", f"train.checkpoint_every={EVERY}", "train.sample_tokens=0",
    f"data.paths=[{ROOT / 'optim'}]",
]  # fmt: skip
PLACES = [
    "starting", "training", "saving: tensors", "saving: checksums", "saving: state and manifest",
    "saving: rename, latest", "ending",
]  # fmt: skip
LIFE = {"async": 1.6, "sync": 0.9}  # seconds about that a run left alone takes from its first step on, slow as it is
SLOW = 0.01  # seconds that the disk takes longer each time, and a step


class Whereabouts:
    """Where a run is, in memory shared with its parent.

    place, save: of its own thread, and of the running save or 0, as numbers of PLACES
    began_at, steps: the first and the latest step of this life
    saving: the step that is being saved, or 0
    """

    def __init__(self):
        self._memory = mmap.mmap(-1, 40)

    def set(self, **what):
        for name, value in what.items():
            struct.pack_into("q", self._memory, 8 * ("place", "save", "began_at", "steps", "saving").index(name), value)

    def read(self):
        place, save, began_at, steps, saving = struct.unpack("5q", self._memory)
        return PLACES[save or place], began_at, steps, saving


def note(where, function, before, after=None):
    def noting(*given, **named):
        where.set(**before)
        try:
            return function(*given, **named)
        finally:
            where.set(**(after or {}))

    return noting


def watch(where):
    """In a child: make the disk slow, and have the run write down where it is."""
    fsync, create = os.fsync, filesystem.FileSystem.create_stream

    def slow_fsync(descriptor):
        time.sleep(SLOW)
        fsync(descriptor)

    class Slowly:
        def __init__(self, stream):
            self.stream = stream

        def write(self, content):
            for start in range(0, len(content), len(content) // 4 + 1):
                self.stream.write(content[start : start + len(content) // 4 + 1])
                self.stream.flush()
                time.sleep(SLOW)
            return len(content)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    @contextmanager
    def slow_stream(system, path, mode):
        with create(system, path, mode) as stream:
            yield Slowly(stream)

    os.fsync, filesystem.FileSystem.create_stream = slow_fsync, slow_stream
    place, saving = PLACES.index, saver.Saver
    saving._write = note(where, saving._write, {"save": place("saving: tensors")}, {"save": 0, "saving": 0})
    saving._checksums = note(where, saving._checksums, {"save": place("saving: checksums")})
    saving._put_in_place = note(where, saving._put_in_place, {"save": place("saving: state and manifest")})
    rename = Path.rename

    def renaming(path, target):
        if path.parent.name == "checkpoints" and where.read()[0].startswith("saving"):
            where.set(save=place("saving: rename, latest"))
            time.sleep(SLOW)
            result = rename(path, target)
            time.sleep(SLOW)
            return result
        return rename(path, target)

    Path.rename = renaming
    trainer.Trainer.finish = note(where, trainer.Trainer.finish, {"place": place("ending")})
    step, save = trainer.Trainer.train_step, saving.save

    def stepping(self, number):
        if where.read()[0] == "starting":
            where.set(place=place("training"), began_at=number)
        time.sleep(SLOW)
        result = step(self, number)
        where.set(steps=number + 1)
        return result

    def save_noted(self, number, *given):
        self.wait()
        where.set(saving=number)
        save(self, number, *given)

    trainer.Trainer.train_step, saving.save = stepping, save_noted


def live(overrides, data, where=None):
    """A life of the run in a child; returns its process."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if where:
            watch(where)
        config = load(overrides)
        folder = RunFolder(config)
        with folder.locked():
            trainer.Trainer(config, World(0, 1, torch.device("cpu")), data, folder, StopRequest()).fit()
        code = 0
    except BaseException as error:  # of a child, which must not go on as if it were the parent
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def losses(folder):
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [(x["step"], x.get("train/loss"), x.get("train/grad_norm"), x.get("val/loss")) for x in lines]


def tensors(folder):
    """All bits of each checkpoint, as a number each; the order of tensors in their file is nobody's promise."""
    return {path.name: {name: _bits(t) for name, t in _tensors_in(path)} for path in folder.checkpoints.glob("step-*")}


def _tensors_in(path):
    return [item for file in path.glob("*.safetensors") for item in load_file(file).items()]


def _bits(tensor):
    return tensor.dtype, tensor.shape, zlib.crc32(tensor.flatten().view(torch.uint8).numpy().tobytes())


def committed(folder):
    newest = latest(folder.checkpoints)
    return int(newest.name.removeprefix("step-")) if newest else 0


def kill(times, root, seed=0):
    """Where so many kills hit, and how many steps each of them cost, after all runs ended as the one left alone."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    common = [*RUN, f"run.root={root}", f"data.root={root / 'prepared'}"]
    data = ready(load([*common, "run.name=none"]), 1)
    whole, draw = RunFolder(load([*common, "run.name=whole"])), random.Random(seed)
    assert os.waitpid(live([*common, "run.name=whole"], data), 0)[1] == 0
    where, hits, lost, runs = Whereabouts(), Counter(), {"async": [], "sync": []}, 0
    while hits.total() < times:
        way = min(lost, key=lambda way: len(lost[way]))  # in which fewer were killed so far
        overrides = [*common, f"run.name=run-{runs}", f"train.async_save={'false' if way == 'sync' else 'true'}"]
        folder, runs = RunFolder(load(overrides)), runs + 1
        while True:
            expected = committed(folder)
            where.set(place=0, save=0, began_at=-1, steps=expected, saving=0)
            child, ended, moment = live(overrides, data, where), (0, 0), float("inf")
            # Some moment of a life from its first step on, a tenth of them from its start; the last is left alone.
            early, share, last = draw.random() < 0.1, draw.random(), hits.total() == times
            life = LIFE[way] * (STEPS - expected + EVERY) / STEPS
            while not ended[0]:
                if moment == float("inf") and not last and (early or where.read()[0] != "starting"):
                    moment = time.monotonic() + share * life
                if time.monotonic() >= moment:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.001)
                ended = os.waitpid(child, os.WNOHANG)
            place, began_at, steps, saving = where.read()
            assert began_at in (-1, expected), f"began at {began_at}, but {expected} was on the disk"
            if ended[1] == 0:
                break
            assert os.WIFSIGNALED(ended[1]), "a life ended by itself"
            hits[place] += 1
            lost[way].append(max(0, steps - committed(folder)))
            during = steps - saving if saving else 0  # steps made while the save that was killed was running
            assert lost[way][-1] <= EVERY + during, f"{lost[way][-1]} steps lost, {during} of them during a save"
        assert losses(folder) == losses(whole), folder.path
        assert tensors(folder) == tensors(whole), folder.path
        assert newest_good(folder.checkpoints)[0].name == f"step-{STEPS:08d}"
        assert folder.summary_file.exists()
        assert not [p for p in folder.path.rglob("*") if files.UNFINISHED in p.name or ".damaged" in p.name]
        assert (folder.checkpoints / "latest").resolve().name == f"step-{STEPS:08d}"
    return {
        "kills": hits.total(), "runs": runs, "inside a save": sum(n for p, n in hits.items() if "saving" in p),
        "where": {place: hits[place] for place in PLACES},
        "steps lost": {way: dict(sorted(Counter(n).items())) for way, n in lost.items()}, "interval": EVERY,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(kill(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])), indent=1))
