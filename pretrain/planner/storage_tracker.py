"""Record every tensor storage that a program allocates and frees: total bytes at any time, and their kinds.

Works with real tensors and with fake tensors, whose storages have sizes but no memory. Memory that a kernel allocates
and frees within one operation is not recorded.
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

TEMPORARIES = "temporaries"  # the kind of a storage without a label
GATHERED = "gathered_weights"  # storages that are emptied and refilled, which only FSDP2 does


class StorageTracker(TorchDispatchMode):
    """While entered, log the allocation and the end of every storage that an operation returns.

    Storages are numbered in the order of allocation. Their kind is "temporaries" unless ``label`` sets another kind,
    which then applies to the complete lifetime of the storage; a storage that is emptied and refilled, as FSDP2 does,
    has the kind "gathered_weights". ``mark`` divides the log into named phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []  # (number of a storage, bytes gained or lost)
        self.marks: list[tuple[int, str]] = []  # (place in the log where a phase begins, its name)
        self.kinds: dict[int, str] = {}
        self.allocated = 0  # storages so far; the number of the next one
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # by address: number, and a reference that logs its end
        self._sizes: dict[int, int] = {}  # bytes by number, of living storages
        self._resize: Any = UntypedStorage.resize_
        self._resize_patch = patch.object(UntypedStorage, "resize_", lambda *arguments: self._resized(*arguments))

    def __enter__(self):
        self._resize_patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._resize_patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented  # after unwrapping, this is called with the wrapper's inner tensors
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._numbers(leaf)
        return result

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Set the kind of the storages of ``tensors``. None entries are skipped."""
        for tensor in tensors:
            if tensor is not None:
                self.kinds |= dict.fromkeys(self._numbers(tensor), kind)

    def label_since(self, number: int, kind: str) -> None:
        """Set the kind of living storages numbered ``number`` or higher that have no label yet."""
        for alive, _ in self._alive.values():
            if alive >= number:
                self.kinds.setdefault(alive, kind)

    def mark(self, name: str) -> None:
        """Begin a phase called ``name``; it ends at the next mark."""
        self.marks.append((len(self.log), name))

    def peaks(self) -> dict[str, Counter[str]]:
        """For each phase, the bytes by kind at its peak. Names end in a number ("end 1"), because phases repeat."""
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
        """The numbers of a tensor's storages (a wrapper subclass has several); new storages are logged."""
        return [self._number(storage) for storage in get_untyped_storages(tensor)]

    def _number(self, storage: UntypedStorage) -> int:
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][0]
        number, size = self.allocated, storage.nbytes()
        self.allocated += 1

        def freed(_: weakref.ref) -> None:
            del self._alive[address]
            self.log.append((number, -self._sizes.pop(number)))

        self._alive[address] = number, weakref.ref(storage, freed)
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
