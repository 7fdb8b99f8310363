"""Every tensor storage that a program makes and lets go, in order: how much it holds at any moment, and in what.

Real tensors or fake ones, whose storages have sizes but no memory. What a kernel allocates and frees within one
operation is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

from torch import Tensor, UntypedStorage
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

TEMPORARIES = "temporaries"  # what nobody gave another kind
GATHERED = "gathered_weights"  # whose storages are emptied and filled again: FSDP2's alone


class Storages(TorchDispatchMode):
    """While entered, logs every storage that an operation returns, and its end.

    Storages have numbers in the order of their making, and a kind: TEMPORARIES until ``label`` gives them another,
    which then holds for their whole life. ``mark`` divides the log into named stretches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []  # the number of a storage and the bytes that it gains or loses
        self.marks: list[tuple[int, str]] = []  # where in the log a stretch begins, and its name
        self.kinds: dict[int, str] = {}
        self.made = 0
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # by address: its number, and what tells of its end
        self._sizes: dict[int, int] = {}  # by number, of those alive
        self._resize: Any = UntypedStorage.resize_
        self._resizing = patch.object(UntypedStorage, "resize_", lambda *arguments: self._resized(*arguments))

    def __enter__(self):
        self._resizing.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._resizing.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented  # a wrapper comes apart first, and the tensors within it come here
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._numbers(leaf)
        return result

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """The storages of ``tensors`` are of this kind; None stands for a tensor that is not there."""
        for tensor in tensors:
            if tensor is not None:
                self.kinds |= dict.fromkeys(self._numbers(tensor), kind)

    def label_since(self, number: int, kind: str) -> None:
        """Those from ``number`` on that are still alive and of no kind yet are of this kind."""
        for alive, _ in self._alive.values():
            if alive >= number:
                self.kinds.setdefault(alive, kind)

    def mark(self, name: str) -> None:
        """From here to the next mark the log is a stretch of this name."""
        self.marks.append((len(self.log), name))

    def peaks(self) -> dict[str, Counter[str]]:
        """By stretch (names are numbered, they may repeat) what was held at its peak: bytes by kind."""
        peaks: dict[str, Counter[str]] = {}
        repeated: Counter[str] = Counter()
        held: Counter[str] = Counter()
        ends = [place for place, _ in self.marks[1:]] + [len(self.log)]
        for number, gained in self.log[: self.marks[0][0]]:
            held[self.kinds.get(number, TEMPORARIES)] += gained
        for (begin, name), end in zip(self.marks, ends, strict=True):
            repeated[name] += 1
            total = most = held.total()
            peak = held.copy()
            for number, gained in self.log[begin:end]:
                held[self.kinds.get(number, TEMPORARIES)] += gained
                total += gained
                if total > most:
                    most, peak = total, held.copy()
            peaks[f"{name} {repeated[name]}"] = peak
        return peaks

    def _numbers(self, tensor: Tensor) -> list[int]:
        """The numbers of a tensor's storages (a wrapper subclass has several); those not seen before are logged."""
        return [self._number(storage) for storage in get_untyped_storages(tensor)]

    def _number(self, storage: UntypedStorage) -> int:
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][0]
        number, size = self.made, storage.nbytes()
        self.made += 1

        def gone(_: weakref.ref) -> None:
            del self._alive[address]
            self.log.append((number, -self._sizes.pop(number)))

        self._alive[address] = number, weakref.ref(storage, gone)
        self._sizes[number] = size
        self.log.append((number, size))
        return number

    def _resized(self, storage: UntypedStorage, size: int) -> UntypedStorage:
        number = self._number(storage)
        result = self._resize(storage, size)
        self.log.append((number, size - self._sizes[number]))
        self._sizes[number] = size
        if size == 0:
            self.kinds[number] = GATHERED
        return result
