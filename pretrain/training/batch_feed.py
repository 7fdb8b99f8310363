"""The batches of a run, made in advance by a thread. The dataset is prepared, or is still being prepared."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from data.loading.batches import TrainBatches, validation_batches
from data.loading.prefetch import MicroBatches, Prefetch
from data.streaming.background import StreamedDataset
from data.token_dataset import PreparedDataset, content_of
from pretrain.cli.signals import StopRequest
from pretrain.config.schema import Config, ConfigError, micro_batch_size
from pretrain.distributed.world import World
from pretrain.setup.data import DataWait


class BatchFeed:
    """The training and validation batches of one process.

    Steps count from 0. Before a step is read, by ``micro_batches`` or by a method of ``batches``, call ``wait`` with
    this step on every process.

    Args:
        data: a prepared dataset, or a ``StreamedDataset``, which grows during training.
        stop: if it is set on any process while ``wait`` waits, ``wait`` returns False on all processes.

    Attributes:
        batches: the training batches.
        ahead: makes the micro-batches of the next step in a thread, while the current step is trained.
    """

    def __init__(self, config: Config, world: World, data: PreparedDataset, stop: StopRequest):
        train = config.train
        self.data, self._train, self._world = data, train, world
        self._sequences = micro_batch_size(train, world.size)
        self.batches = TrainBatches(
            data.train, train.seq_len, train.tokens_per_step // train.seq_len, self._sequences,
            train.seed, world.rank, world.size, train.document_masks,
            config.data.shuffle_block if config.data.on_the_fly else None,
        )  # fmt: skip
        self._streams = config.data.on_the_fly
        self._wait: DataWait | None = None
        if isinstance(data, StreamedDataset):
            self._wait = DataWait(world, data.preparation, stop, lambda: data.train.complete)
        self.ahead = Prefetch(self.batches.micro_batches, world.device.type == "cuda", self.batches.ready)

    def wait(self, step: int) -> bool:
        """Wait until the batch of ``step`` can be read. Returns False if the run is asked to stop first.

        Raises:
            ValueError: on every process: the preparation of the data has failed.
        """
        if self._wait is None:
            return True
        began = time.perf_counter()
        try:
            return self._wait(lambda: self.batches.ready(step))
        finally:
            self.ahead.add(time.perf_counter() - began)

    def micro_batches(self, step: int) -> MicroBatches:
        """This process' micro-batches of ``step`` (from 0): inputs and targets, int64 (sequences, seq_len) each.

        They are on the CPU, in pinned memory for a GPU. A micro-batch has ``train.micro_batch_size`` sequences, or, if
        this is null, all of this process' sequences. With ``train.document_masks`` it also has the document starts, see
        ``data.loading.batches``.
        """
        return self.ahead(step)

    def identity(self, steps: int) -> dict[str, Any]:
        """Hashes of the tokenizer and of the data of the first ``steps`` steps, for a checkpoint; JSON-serialisable."""
        content, mixture = content_of(self.data.manifest), self.data.manifest.get("mixture")
        identity: dict[str, Any] = {"fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer.sha256}
        identity |= {"content": content} if content else {}
        identity |= {"mixture": mixture} if mixture else {}
        return identity | ({"read": self.batches.digest(steps)} if self._streams else {})

    def require_same(
        self, identity: dict[str, Any], steps: int, trained: Path | None, changes: dict[str, tuple[Any, Any]]
    ) -> None:
        """Compare the data of the first ``steps`` steps with the data that a checkpoint was trained on.

        Args:
            identity: the result of ``identity`` in the checkpoint.
            trained: the path of the checkpoint, for the message.
            changes: the old and the new value of each setting that has changed since, for the message.

        Raises:
            ConfigError: the data differ.
        """
        if steps:
            self.wait(steps - 1)
        ours = self.identity(steps)
        # Fingerprints also depend on the names of documents, and so on the name of their folder.
        # The content of a streamed corpus is known only after all of it has been read.
        free = {"mixture", "fingerprint" if "content" in identity.keys() & ours.keys() else "content"}
        if any(identity.get(key) != ours.get(key) for key in {*identity, *ours} - free):
            other = [f"{key} was {old}, is now {new}" for key, (old, new) in changes.items() if key.startswith("data.")]
            raise ConfigError(
                f"{trained} was trained on another corpus or tokenizer than {self.data.folder}; restore that corpus, "
                + "\n".join(["or choose another run.name", *other])
            )

    def validation(self) -> Iterator[tuple[Tensor, ...]]:
        """This process' batches from ``data.loading.batches.validation_batches``.

        All processes together get at most ``train.eval_sequences`` sequences.
        """
        train = self._train
        return validation_batches(
            self.data.val, train.seq_len, self._sequences, self._world.rank, self._world.size,
            train.eval_sequences, train.document_masks,
        )  # fmt: skip
