"""Batches of token windows for training and validation.

A split is cut into windows of `seq_len` inputs and targets. Targets are the inputs shifted by one token: the last
target of a window is the first input of the next window. Documents are packed: a window may contain several. If
documents begin with a prompt, each document is one window, truncated to `seq_len` targets or padded, and the prompt's
tokens are not targets. With `masks`, a batch also contains the starts of documents, and the first token of a document
is not a target, because no token of the same document precedes it.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.loading.order import ENDLESS, BlockOrder, EpochOrder, MixtureOrder
from data.shards.reader import Tokens

logger = logging.getLogger(__name__)

IGNORED = -100  # stands for a target without loss, as in torch's cross-entropy


class TrainBatches:
    """The training batches of one rank.

    Sequence j of step s is sample s * sequences_per_step + j of the order (data.loading.order). Each rank takes a
    contiguous range of j and cuts it into micro-batches. So the tokens of a step depend neither on the number of ranks
    nor on the micro-batch size. Tokens at the end of the split that do not fill a window are unused.

    Args:
        tokens: The training split, `PreparedDataset.train`.
        seq_len: Inputs and targets per sequence.
        sequences_per_step: Sequences per step on all ranks together.
        micro_batch_size: Sequences per micro-batch.
        seed: The seed of the order.
        rank: The number of this rank, from 0.
        world_size: The number of ranks.
        masks: Whether batches contain the starts of documents, and the first token of a document is not a target. Not
            for documents that begin with a prompt.
        block: Windows per shuffle block in the first epoch; needed when the split may still be incomplete. None
            shuffles the complete epoch.

    Raises:
        ValueError: There is no full window or no response within `seq_len`, or a step does not divide into ranks and
            micro-batches.
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
        self._tokens, self._seq_len, self._masks = tokens, seq_len, masks
        self._targets = None if tokens.given is None else _targets_by_document(tokens, seq_len)
        self._order = self._make_order(seed, block)
        self._checked = False
        if not isinstance(self._order, BlockOrder):
            self._check_windows()
        if sequences_per_step < 1 or sequences_per_step % (micro_batch_size * world_size):
            raise ValueError(
                f"train.tokens_per_step: {sequences_per_step} sequences per step cannot be divided among {world_size} "
                f"processes with micro-batches of {micro_batch_size}; change it or train.micro_batch_size"
            )
        self._sequences_per_step, self._micro_batch_size = sequences_per_step, micro_batch_size
        self._share = sequences_per_step // world_size
        self._first = rank * self._share

    def _make_order(self, seed: int, block: int | None) -> EpochOrder | BlockOrder | MixtureOrder:
        tokens, seq_len = self._tokens, self._seq_len
        if block:
            return BlockOrder(tokens, seq_len, block, seed)
        if not tokens.parts:
            windows = (len(tokens) - 1) // seq_len if tokens.given is None else tokens.document_count
            return EpochOrder(windows, seed)
        counts = [(length - 1) // seq_len for _, length, _ in tokens.parts]
        if short := [number for number, count in enumerate(counts) if count < 1]:
            raise ValueError(
                f"data.mixture[{short[0]}]: this corpus has {tokens.parts[short[0]][1]} training tokens, and a window "
                f"of train.seq_len={seq_len} needs {seq_len + 1}; give more text for it, or lower train.seq_len"
            )
        return MixtureOrder(counts, [weight for *_, weight in tokens.parts], seed)

    @property
    def windows(self) -> int:
        """Windows per epoch; 2**62 (`order.ENDLESS`) while the split is being prepared.

        For a mixture, about the number of windows after which each corpus has been read at least once.
        """
        return self._order.windows

    def _check_windows(self) -> None:
        self._checked = True
        if self.windows < 1:
            raise ValueError(
                f"data: the training split has {len(self._tokens)} tokens, but a window of train.seq_len="
                f"{self._seq_len} needs {self._seq_len + 1}; give more text (data.paths, data.max_bytes) or lower "
                "train.seq_len"
            )
        if self._targets is None:
            left_out = len(self._tokens) - 1 - self.windows * self._seq_len
            logger.info(
                "training split: %d windows of %d tokens per epoch, the last %d tokens are unused",
                *(self.windows, self._seq_len, left_out),
            )

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """This rank's micro-batches of a step (from 0): inputs and targets, int64 (micro_batch_size, seq_len) each.

        With `masks`, each also has the document starts, int32 (documents + 1,): positions in the flattened inputs of
        the micro-batch, and at the end the number of inputs. The start of each sequence is one of them.
        """
        places = self._places(step, self._first, self._share)
        for chunk in places.reshape(-1, self._micro_batch_size):
            yield _batch(self._tokens, chunk.tolist(), self._seq_len, self._micro_batch_size, self._masks)

    def ready(self, step: int) -> bool:
        """Whether the samples of a step can be read now. False only while the split is being prepared.

        Raises:
            ValueError: The split is complete and has no full window.
        """
        if not isinstance(self._order, BlockOrder) or self._checked:
            return True
        readable = self._order.can_read((step + 1) * self._sequences_per_step)
        if self.windows < ENDLESS:
            self._check_windows()
        return readable

    def digest(self, step: int) -> str:
        """With `block`, the `BlockOrder.digest` of all samples of the steps before `step`; else an empty string."""
        return self._order.digest(step * self._sequences_per_step) if isinstance(self._order, BlockOrder) else ""

    def targets(self, step: int) -> int:
        """The number of targets of a step on all ranks together, to divide the loss by: 1 if there are none."""
        if self._targets is None:
            every = self._sequences_per_step * self._seq_len
            if not self._masks:
                return every
            bounds = map(self._bounds, self._places(step, 0, self._sequences_per_step).tolist())
            return max(1, every - sum(len(self._tokens.document_starts(first + 1, last)) for first, last in bounds))
        return max(1, int(self._targets[self._places(step, 0, self._sequences_per_step)].sum()))

    def documents(self, step: int) -> list[str]:
        """Names of the documents in a step's batch on all ranks, each once, in the order of the sequences."""
        places = self._places(step, 0, self._sequences_per_step).tolist()
        return list(dict.fromkeys(name for place in places for name in self._tokens.documents(*self._bounds(place))))

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of the first sequence of a step."""
        return step * self._sequences_per_step // self.windows

    def _places(self, step: int, first: int, count: int) -> np.ndarray:
        """The starts of `count` samples of a step, from sample `first` on, int64 (count,).

        A start is the position of the first token or, if documents begin with a prompt, the number of the document.
        """
        samples = step * self._sequences_per_step + first + np.arange(count, dtype=np.int64)
        if isinstance(self._order, MixtureOrder):
            corpora, windows = self._order(samples)
            return np.array([first for first, *_ in self._tokens.parts])[corpora] + windows * self._seq_len
        windows = self._order(samples)
        return windows * self._seq_len if self._targets is None else windows

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
    """This rank's batches of a split in order: inputs and targets, int64 (batch_size, seq_len) each.

    Without prompts, `max_sequences` and `masks`, each token except the first is a target once over all ranks. The last
    window and the last batches are padded with input 0 and target -100. All ranks get the same number of batches.

    Args:
        batch_size: Sequences per batch of one rank.
        max_sequences: Maximum number of windows on all ranks together, spread evenly over the split; None: all.
        masks: As in `TrainBatches`: each batch also has the document starts, see `TrainBatches.micro_batches`.
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
    """Inputs and targets, int64 (batch_size, seq_len) each, of the windows at `places`; padded with 0 and -100.

    With `masks` also the document starts, int32 (documents + 1,): positions in the flattened inputs, and at the end the
    number of inputs. The start of every row counts as the start of a document.
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
    """The number of targets of each document, int64 (documents,); logs how many documents `seq_len` truncates.

    Raises:
        ValueError: No response begins within `seq_len`.
    """
    ends = tokens.document_lengths - 1
    counts = np.maximum(np.minimum(ends, seq_len) - tokens.given, 0)
    if not counts.any():
        raise ValueError(f"train.seq_len: no response begins within {seq_len} tokens; raise train.seq_len")
    logger.info(
        "training split: %d prompts with responses; train.seq_len=%d truncates %d of them, %d before the response",
        *(len(ends), seq_len, (ends > seq_len).sum(), (counts == 0).sum()),
    )
    return counts
