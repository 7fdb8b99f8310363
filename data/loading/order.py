"""Several corpora in shares: which window of which corpus a sample of a run is, as a function of its number alone.

Samples come in rounds of 1000. A round holds of every corpus its share, exactly, in an order of its own; a corpus gives
its windows in shuffled epochs, one behind the other, whatever the others do.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from data.shards.reader import Tokens

ROUND = 1000


def in_round(weights: Sequence[float]) -> np.ndarray:
    """How many samples of a round each corpus gives, (corpora,) int64: its share, rounded, and one at least."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * ROUND
    counts = np.maximum(1, np.floor(shares).astype(np.int64))
    for corpus in np.argsort(-(shares - counts), kind="stable")[: max(0, ROUND - int(counts.sum()))]:
        counts[corpus] += 1
    counts[counts.argmax()] -= counts.sum() - ROUND  # what the least shares were given beyond their own
    return counts


class Mixture:
    """`windows` (corpora,) is how many each corpus has, `permute(positions, size, key)` a shuffle of range(size)."""

    def __init__(
        self, windows: Sequence[int], weights: Sequence[float], seed: int, permute: Callable[..., np.ndarray]
    ) -> None:
        self._windows, self._seed, self._permute = np.asarray(windows), seed, permute
        self._counts = in_round(weights)
        self._begins = np.cumsum(self._counts) - self._counts

    @property
    def epoch(self) -> int:
        """The samples after which every corpus was gone through at least once."""
        return int(np.ceil(self._windows / self._counts * ROUND).max())

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus and the window in it, int64 each, of the samples (n,)."""
        rounds, slots = np.divmod(samples, ROUND)
        for number in np.unique(rounds):
            here = rounds == number
            slots[here] = self._permute(slots[here], ROUND, f"{self._seed} mixture {number}")
        corpora = np.searchsorted(self._begins, slots, side="right") - 1
        given = rounds * self._counts[corpora] + slots - self._begins[corpora]
        epochs, windows = np.divmod(given, self._windows[corpora])
        for corpus, epoch in set(zip(corpora.tolist(), epochs.tolist(), strict=True)):
            here = (corpora == corpus) & (epochs == epoch)
            key = f"{self._seed} shuffle {epoch} of {corpus}"
            windows[here] = self._permute(windows[here], int(self._windows[corpus]), key)
        return corpora, windows


TAIL = 2**16  # tokens that stand for all before them: what changes there moves these
ENDLESS = 2**62


class Blocks:
    """Which window a sample is: in the first epoch they come in their order, shuffled in blocks of `size`.

    A later epoch is one shuffle of all. `permute(positions, size, key)` is a shuffle of range(size).
    """

    def __init__(self, tokens: Tokens, seq_len: int, size: int, seed: int, permute: Callable[..., np.ndarray]) -> None:
        self._tokens, self._seq_len, self._size, self._seed, self._permute = tokens, seq_len, size, seed, permute

    @property
    def windows(self) -> int:
        """In an epoch; as good as endless, as long as nobody knows."""
        return (len(self._tokens) - 1) // self._seq_len if self._tokens.complete else ENDLESS

    def can_read(self, samples: int) -> bool:
        """Whether the blocks of the first so many samples can be read by now."""
        return self._tokens.can_read(self._end(samples, ENDLESS))

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """The windows, int64, of samples (n,) that were reached."""
        total = self.windows
        epochs, windows = np.divmod(samples, total)
        starts = np.where(epochs == 0, windows // self._size * self._size, 0)
        for epoch, start in set(zip(epochs.tolist(), starts.tolist(), strict=True)):
            here = (epochs == epoch) & (starts == start)
            key = f"{self._seed} shuffle {epoch}" if epoch else f"{self._seed} block {start // self._size}"
            size = total if epoch else min(self._size, total - start)
            windows[here] = start + self._permute(windows[here] - start, size, key)
        return windows

    def digest(self, samples: int) -> str:
        """Stands for everything up to the end of the block that the first so many samples end in."""
        end = self._end(samples, self.windows) if samples else 0
        start = max(0, end - TAIL)
        names = "\0".join(self._tokens.documents(start, end))
        return hashlib.sha256(self._tokens[start:end].tobytes() + names.encode()).hexdigest()

    def _end(self, samples: int, total: int) -> int:
        """Behind the last token of the block that the first so many samples end in."""
        return min(-(-samples // self._size) * self._size, total) * self._seq_len + 1


def permute(positions: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a shuffle of range(size) puts each position: int64 in and out, no table needed.

    A Feistel network of 8 rounds permutes the smallest range of 4^k ≥ size; a result beyond `size` is put
    in again until it is within (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.frombuffer(hashlib.blake2b(key.encode()).digest(), dtype="<u8")
    out = positions.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[todo] = left << half | right
        todo = out >= np.uint64(size)
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 64-bit finalizer (Appleby)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))
