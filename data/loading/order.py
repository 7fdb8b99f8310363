"""The order of training: the window of sample n is computed from n, the seed and the number of windows.

A sample is one training sequence. Samples are numbered over all steps and ranks of a run. A window is a range of
`seq_len` tokens of the training split, or one document if documents begin with a prompt.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from data.shards.reader import Tokens

ROUND = 1000
"""The number of samples in a round of a mixture. Each corpus has the same number of samples in every round."""
TAIL = 2**16
"""The number of tokens that `BlockOrder.digest` hashes. A change before them is detected only if it shifts them."""
ENDLESS = 2**62
"""Stands for the number of windows while it is unknown."""


class EpochOrder:
    """Shuffled epochs: each of `windows` windows once per epoch, in a new order each time.

    `corpus` is the number of the corpus in a mixture, whose corpora have different orders; None without a mixture.
    """

    def __init__(self, windows: int, seed: int, corpus: int | None = None) -> None:
        self.windows, self._seed = windows, seed
        self._suffix = "" if corpus is None else f" of {corpus}"

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """The windows, int64 (n,), of samples, int64 (n,)."""
        epochs, windows = np.divmod(samples, self.windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(windows[here], self.windows, f"{self._seed} shuffle {epoch}{self._suffix}")
        return windows


class BlockOrder:
    """The order for a split that is still being prepared: its first epoch is shuffled in blocks of `size` windows.

    The first epoch keeps the blocks in the order of the split, so that training can begin before the split is complete.
    A later epoch is one shuffle of all windows.
    """

    def __init__(self, tokens: Tokens, seq_len: int, size: int, seed: int) -> None:
        self._tokens, self._seq_len, self._size, self._seed = tokens, seq_len, size, seed

    @property
    def windows(self) -> int:
        """Windows per epoch; ENDLESS until the split is complete."""
        return (len(self._tokens) - 1) // self._seq_len if self._tokens.complete else ENDLESS

    def can_read(self, samples: int) -> bool:
        """Whether the blocks of the first `samples` samples can be read now."""
        return self._tokens.can_read(self._end(samples, ENDLESS))

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """The windows, int64 (n,), of samples (n,) for which `can_read` was true."""
        total = self.windows
        epochs, windows = np.divmod(samples, total)
        starts = np.where(epochs == 0, windows // self._size * self._size, 0)
        for epoch, start in set(zip(epochs.tolist(), starts.tolist(), strict=True)):
            here = (epochs == epoch) & (starts == start)
            key = f"{self._seed} shuffle {epoch}" if epoch else f"{self._seed} block {start // self._size}"
            size = total if epoch else min(self._size, total - start)
            windows[here] = start + permute(windows[here] - start, size, key)
        return windows

    def digest(self, samples: int) -> str:
        """A SHA-256 in hex that identifies the text trained on in the first `samples` samples.

        It covers the last 65,536 tokens (TAIL) up to the end of the block of sample `samples` - 1, and the names of
        their documents. Earlier text is not hashed: a change there is noticed only if it moves the hashed tokens.
        """
        end = self._end(samples, self.windows) if samples else 0
        start = max(0, end - TAIL)
        names = "\0".join(self._tokens.documents(start, end))
        return hashlib.sha256(self._tokens[start:end].tobytes() + names.encode()).hexdigest()

    def _end(self, samples: int, windows: int) -> int:
        """The number of the token after the block of sample `samples` - 1."""
        return min(-(-samples // self._size) * self._size, windows) * self._seq_len + 1


class MixtureOrder:
    """The order for a mixture of corpora, with shares given by their weights.

    Samples come in rounds of 1000 (ROUND). Each corpus has the same number of samples in every round
    (`samples_per_round`), in shuffled order. The windows of each corpus come in shuffled epochs, independent of the
    other corpora.

    Args:
        windows: (corpora,) The number of windows of each corpus.
        weights: (corpora,) Positive numbers with any sum.
    """

    def __init__(self, windows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._corpora = [EpochOrder(count, seed, corpus) for corpus, count in enumerate(windows)]
        self._seed = seed
        self._counts = samples_per_round(weights)
        self._begins = np.cumsum(self._counts) - self._counts
        self.windows = int(np.ceil(np.asarray(windows) / self._counts * ROUND).max())
        """About the number of samples after which each corpus has been read at least once."""

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus and the window in it, int64 (n,) each, of samples (n,)."""
        rounds, slots = np.divmod(samples, ROUND)
        for number in np.unique(rounds):
            here = rounds == number
            slots[here] = permute(slots[here], ROUND, f"{self._seed} mixture {number}")
        corpora = np.searchsorted(self._begins, slots, side="right") - 1
        given = rounds * self._counts[corpora] + slots - self._begins[corpora]
        windows = np.empty_like(given)
        for corpus in np.unique(corpora):
            here = corpora == corpus
            windows[here] = self._corpora[corpus](given[here])
        return corpora, windows


def samples_per_round(weights: Sequence[float]) -> np.ndarray:
    """The number of samples of each corpus per 1000 samples (ROUND), int64 (corpora,): at least one.

    The numbers are in proportion to `weights`, rounded.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * ROUND
    counts = np.maximum(1, np.floor(shares).astype(np.int64))
    for corpus in np.argsort(-(shares - counts), kind="stable")[: max(0, ROUND - int(counts.sum()))]:
        counts[corpus] += 1
    counts[counts.argmax()] -= counts.sum() - ROUND  # taken by corpora whose share is less than one sample
    return counts


def permute(positions: np.ndarray, size: int, key: str) -> np.ndarray:
    """The new position of each of `positions` in a shuffle of range(size), int64 (n,), without a table.

    Each `key` gives another shuffle. A Feistel network of 8 rounds permutes range(4^k) for the smallest 4^k ≥ size. A
    result of `size` or more is permuted again until it is below `size` (cycle walking; Black and Rogaway, "Ciphers with
    arbitrary finite domains").
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.frombuffer(hashlib.blake2b(key.encode()).digest(), dtype="<u8")
    out = positions.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_finalize(right ^ round_key) & mask)
        out[todo] = left << half | right
        todo = out >= np.uint64(size)
    return out.astype(np.int64)


def _finalize(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 64-bit finalizer (Appleby)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))
