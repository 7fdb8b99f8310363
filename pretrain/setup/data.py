"""Training while the data are being prepared: all processes of a run wait together, and end together.

Each reads for itself what is on the disk, but none goes on with a step before all can: one that waited alone would
neither hear of a signal that another got, nor that the preparation, which belongs to the main process, has failed.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial

import torch

from data.prepare import prepare
from data.settings import DataSettings
from data.streaming.background import BackgroundPreparation, StreamedDataset
from data.token_dataset import PreparedDataset
from data.tokenizer import Tokenizer
from pretrain.cli.signals import StopRequest
from pretrain.config.schema import Config
from pretrain.distributed.world import World
from pretrain.inference.init_from import require_same_tokenizer
from pretrain.inference.pretrained import require_embeddings
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
SHARED_SECONDS = 60.0  # what a disk may take to show the others what one process has written
SAY_SECONDS = 10.0


class Waiting:
    """Waits until something is ready on every process; once the data are `whole` on all of them, everything is."""

    def __init__(
        self, world: World, beside: BackgroundPreparation, stop: StopRequest, whole: Callable[[], bool]
    ) -> None:
        self._world, self._beside, self._stop, self._whole, self._over = world, beside, stop, whole, False

    def __call__(self, ready: Callable[[], bool]) -> bool:
        """False when the run is asked to stop first. Call on every process.

        Raises:
            ValueError: on every process, the preparation has failed on one; nothing more will come.
        """
        began = said = alone = time.monotonic()
        while not self._over:
            try:
                there, problem = ready(), self._beside.problem()
            except (ValueError, OSError) as error:
                there, problem = False, str(error)
            alone = alone if there and self._world.is_main else time.monotonic()
            if time.monotonic() > alone + SHARED_SECONDS:
                problem = "data.root: not all processes see what is prepared there; put it on a disk that they share"
            mine = [not there, bool(self._stop), problem is not None, not self._whole()]
            missing, asked, problems, growing = self._world.sum(torch.tensor(mine, dtype=torch.int64)).tolist()
            if problems:
                raise ValueError(next(text for text in self._world.gather_objects(problem) if text is not None))
            self._over = not growing
            if not missing or asked:
                return not missing
            if (now := time.monotonic()) > said + SAY_SECONDS:
                said, tokens = now, self._beside.prepared_tokens()
                logger.info("training has waited %.0f s for data: %s tokens are prepared", now - began, f"{tokens:,}")
            time.sleep(POLL_SECONDS)
        return True


def data_of(config: Config, world_size: int) -> Callable[[World], AbstractContextManager[PreparedDataset]]:
    """Check everything that can be checked without compute, and prepare the data unless that is done ``on_the_fly``.

    Returns what opens them for the processes of the run.

    Raises:
        ValueError, OSError: with the key or file at fault and the mend.
    """
    if config.data.on_the_fly:
        check_run(config, world_size)
        return partial(on_the_fly, config)
    prepared = ready(config, world_size)
    return lambda world: nullcontext(prepared)


@contextmanager
def on_the_fly(config: Config, world: World) -> Iterator[StreamedDataset]:
    """The data of ``config`` as soon as training can begin; the main process has them prepared until this ends.

    Raises:
        ValueError: on every process, what is wrong with the text, or with the tokenizer for this run.
    """
    validated, found = config.train.eval_sequences * config.train.seq_len + 1, list[StreamedDataset]()

    def opened() -> bool:
        if not found and (data := beside.dataset(validated)):
            found.append(data)
        return bool(found)

    with BackgroundPreparation(data_settings(config), start=world.is_main) as beside:
        Waiting(world, beside, StopRequest(), whole=lambda: False)(opened)
        check_tokenizer(config, found[0].tokenizer)
        yield found[0]


def ready(config: Config, world_size: int) -> PreparedDataset:
    """Check everything that can be checked without compute, and prepare the data.

    Raises:
        ValueError, OSError: with the key or file at fault and the mend.
    """
    check_run(config, world_size)
    prepared = prepare(data_settings(config))
    check_tokenizer(config, prepared.tokenizer)
    return prepared


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer of the data with the embedding of the model, and with the weights at train.init_from.

    Raises:
        ValueError: they do not go together.
    """
    require_embeddings(tokenizer, config.model.vocab_size)
    if unused := config.model.vocab_size - tokenizer.vocab_size:
        logger.info("%d of %d embedding rows stand for no token of the tokenizer", unused, config.model.vocab_size)
    if config.train.init_from:
        require_same_tokenizer(config.train.init_from, tokenizer)


def check_run(config: Config, world_size: int) -> None:
    """What ``ready`` checks before it prepares.

    Raises:
        ValueError, OSError: with the key or file at fault and the mend.
    """
    check(config, world_size)
    RunFolder(config).check(config)


def data_settings(config: Config) -> DataSettings:
    """What the preparation is told of ``config``."""
    return DataSettings(**{f.name: getattr(config.data, f.name) for f in fields(DataSettings)})
