"""Several corpora in shares: which window of which corpus a sample of a run is, as a function of its number alone.

Samples come in rounds of 1000. A round holds of every corpus its share, exactly, in an order of its own; a corpus gives
its windows in shuffled epochs, one behind the other, whatever the others do.
"""

from collections.abc import Callable, Sequence

import numpy as np

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
