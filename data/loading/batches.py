"""Batches of token windows, in an order that is a pure function of the seed and the step.

A split is cut into windows of `seq_len` inputs and the same number of targets, one token further on; a
window's last target is the next one's first input. Documents are packed: a window may hold several.
Where documents begin with a prompt, each is a window of its own, cut to `seq_len` targets or filled up, and
the prompt's tokens are no targets.
On the fly, while the text is still being prepared, windows are shuffled in blocks (data.growing).
With `masks` a batch says besides where documents begin, and the first token of a document, which nothing before it
tells, is no target.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.loading.order import ENDLESS, Blocks, Mixture, permute
from data.shards.reader import Tokens

logger = logging.getLogger(__name__)

IGNORED = -100  # a target that counts for nothing, as in torch's cross-entropy


class TrainBatches:
    """The training batches of one rank.

    Sequence j of step s is sample s * sequences_per_step + j of an endless row of shuffled epochs. Every
    rank takes a contiguous run of j and cuts it into micro-batches, so that neither the number of ranks
    nor the micro-batch size changes what a step trains on. The last tokens, too few for a window, are
    left out.

    With `block`, of a split that may still grow, the first epoch is shuffled in blocks of so many windows.

    Raises ValueError if there is no full window, or a step does not divide into ranks and micro-batches.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        sequences_per_step: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        masks: bool = False,
        block: int | None = None,
    ) -> None:
        self._blocks = Blocks(tokens, seq_len, block, seed, permute) if block else None
        self._windows = (len(tokens) - 1) // seq_len if tokens.given is None else tokens.document_count
        self._mixture = self._mix(seq_len, seed, tokens) if tokens.parts else None
        self._targets = None if tokens.given is None else _targets_by_document(tokens, seq_len)
        self._tokens, self._seq_len, self._seed, self._masks = tokens, seq_len, seed, masks
        self._counted = False
        if not self._blocks:
            self._count()
        if sequences_per_step < 1 or sequences_per_step % (micro_batch_size * world_size):
            raise ValueError(
                f"train.tokens_per_step: {sequences_per_step} sequences a step do not divide into {world_size} "
                f"processes with micro-batches of {micro_batch_size}; change it or train.micro_batch_size"
            )
        self._sequences_per_step, self._micro_batch_size = sequences_per_step, micro_batch_size
        self._share = sequences_per_step // world_size
        self._first = rank * self._share

    @property
    def windows(self) -> int:
        """In an epoch; of a mixture, until every corpus was gone through at least once; endless while nobody knows."""
        return self._blocks.windows if self._blocks else self._windows

    def _count(self) -> None:
        self._counted = True
        if self.windows < 1:
            raise ValueError(
                f"data: the training split has {len(self._tokens)} tokens, fewer than a window of train.seq_len="
                f"{self._seq_len} and one more; give more text (data.paths, data.max_bytes) or lower train.seq_len"
            )
        if self._targets is None:
            left_out = len(self._tokens) - 1 - self.windows * self._seq_len
            logger.info(
                "training split: %d windows of %d tokens an epoch, the last %d tokens are in none",
                *(self.windows, self._seq_len, left_out),
            )

    def _mix(self, seq_len: int, seed: int, tokens: Tokens) -> Mixture:
        windows = [(length - 1) // seq_len for _, length, _ in tokens.parts]
        if short := [number for number, count in enumerate(windows) if count < 1]:
            raise ValueError(
                f"data.mixture: corpus {short[0]} has fewer training tokens than a window of train.seq_len={seq_len} "
                "and one more; give more of it, or lower train.seq_len"
            )
        mixture = Mixture(windows, [weight for *_, weight in tokens.parts], seed, permute)
        self._windows = mixture.epoch
        return mixture

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """This rank's inputs and targets, int64 (micro_batch_size, seq_len) each, of a step (from 0).

        With masks also where documents begin, as `_batch` says.
        """
        places = self._places(step, self._first, self._share)
        for chunk in places.reshape(-1, self._micro_batch_size):
            yield _batch(self._tokens, chunk.tolist(), self._seq_len, self._micro_batch_size, self._masks)

    def ready(self, step: int) -> bool:
        """Whether the samples of a step can be read by now; with `block` alone they may not be."""
        if not self._blocks or self._counted:
            return True
        there = self._blocks.can_read((step + 1) * self._sequences_per_step)
        if self.windows < ENDLESS:
            self._count()
        return there

    def digest(self, step: int) -> str:
        """With `block`: stands for all that the first so many steps were read from."""
        return self._blocks.digest(step * self._sequences_per_step) if self._blocks else ""

    def targets(self, step: int) -> int:
        """How many targets a step has on all ranks, at least 1."""
        if self._targets is None:
            every = self._sequences_per_step * self._seq_len
            if not self._masks:
                return every
            bounds = map(self._bounds, self._places(step, 0, self._sequences_per_step).tolist())
            return max(1, every - sum(len(self._tokens.document_starts(first + 1, last)) for first, last in bounds))
        return max(1, int(self._targets[self._places(step, 0, self._sequences_per_step)].sum()))

    def documents(self, step: int) -> list[str]:
        """Names of the documents in a step's batch on all ranks, in the order of its sequences, each once."""
        places = self._places(step, 0, self._sequences_per_step).tolist()
        return list(dict.fromkeys(name for place in places for name in self._tokens.documents(*self._bounds(place))))

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that a step's first sequence belongs to."""
        return step * self._sequences_per_step // self.windows

    def _places(self, step: int, first: int, count: int) -> np.ndarray:
        """Where the samples of a step from `first` on begin: at which token, or, with prompts, which document it is."""
        samples = step * self._sequences_per_step + first + np.arange(count, dtype=np.int64)
        if self._mixture:
            corpora, windows = self._mixture(samples)
            return np.array([first for first, *_ in self._tokens.parts])[corpora] + windows * self._seq_len
        if self._blocks:
            return self._blocks(samples) * self._seq_len
        epochs, positions = np.divmod(samples, self.windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = permute(positions[here], self.windows, f"{self._seed} shuffle {epoch}")
        return positions * self._seq_len if self._targets is None else positions

    def _bounds(self, place: int) -> tuple[int, int]:
        if self._targets is not None:
            return self._tokens.document_bounds(place)
        return place, place + self._seq_len + 1


def validation_batches(
    tokens: Tokens,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_sequences: int | None = None,
    masks: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """This rank's inputs and targets, int64 (batch_size, seq_len) each, from a split in order.

    Over all ranks every token but the first is a target once; what fills up the last window and the last
    batches is 0 as input and -100 as target. All ranks get the same number of batches. With `max_sequences`,
    only so many windows, spread evenly over the split.
    """
    count = -(-(len(tokens) - 1) // seq_len) if _given(tokens) is None else tokens.document_count
    windows = np.arange(count)
    if max_sequences is not None and max_sequences < count:
        windows = np.arange(max_sequences) * count // max_sequences
    places = windows * seq_len if _given(tokens) is None else windows
    rounds = -(-len(windows) // (batch_size * world_size))
    for number in range(rounds):
        start = (number * world_size + rank) * batch_size
        yield _batch(tokens, places[start : start + batch_size].tolist(), seq_len, batch_size, masks)


def _batch(tokens: Tokens, places: list[int], seq_len: int, batch_size: int, masks: bool = False) -> tuple[Tensor, ...]:
    """Inputs and targets, int64 (batch_size, seq_len) each, from these places on; the rest is 0, and -100 as target.

    With `masks`, also documents, int32 (documents + 1,): the places among the batch's inputs, row after row, where one
    begins, as every row does, and the number of inputs.
    """
    inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    targets = torch.full((batch_size, seq_len), IGNORED)
    for row, place in enumerate(places):
        given = _given(tokens)
        read = tokens[place : place + seq_len + 1] if given is None else tokens.document(place)
        ids = torch.from_numpy(read[: seq_len + 1].astype(np.int64))
        first = 0 if given is None else int(given[place])  # the target of input i is token i + 1, and token 0 is bos
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, first : len(ids) - 1] = ids[1 + first :]
    if not masks:
        return inputs, targets
    documents = [np.arange(batch_size + 1) * seq_len]
    for row, place in enumerate(places):
        begins = tokens.document_starts(place + 1, place + 1 + seq_len) - place
        targets[row, begins - 1] = IGNORED
        documents.append(row * seq_len + begins[begins < seq_len])
    return inputs, targets, torch.from_numpy(np.unique(np.concatenate(documents)).astype(np.int32))


def _given(tokens: Tokens) -> np.ndarray | None:
    return getattr(tokens, "given", None)


def _targets_by_document(tokens: Tokens, seq_len: int) -> np.ndarray:
    """How many targets each document has, (documents,) int64; says how many documents `seq_len` cuts.

    Raises ValueError if no response begins within `seq_len`.
    """
    ends = tokens.document_lengths - 1
    counts = np.maximum(np.minimum(ends, seq_len) - tokens.given, 0)
    if not counts.any():
        raise ValueError(f"train.seq_len: no response begins within {seq_len} tokens; raise train.seq_len")
    logger.info(
        "training split: %d prompts with responses; train.seq_len=%d cuts %d of them, %d before the response",
        *(len(ends), seq_len, (ends > seq_len).sum(), (counts == 0).sum()),
    )
    return counts
