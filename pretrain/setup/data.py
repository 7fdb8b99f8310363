"""The dataset of a configuration: check the settings, then prepare the data before or during training."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from data.prepare import find, prepare
from data.streaming.background import BackgroundPreparation, StreamedDataset
from data.token_dataset import PreparedDataset
from data.tokenizer import Tokenizer
from pretrain.cli.signals import StopRequest
from pretrain.config.schema import Config
from pretrain.distributed.world import World
from pretrain.inference.init_from import require_same_tokenizer
from pretrain.inference.pretrained import require_embeddings
from pretrain.runs.folder import RunFolder
from pretrain.runs.writable import require_writable
from pretrain.setup.checks import check
from pretrain.setup.trained_data import data_settings, find_trained_data, state_to_resume, validation_tokens

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
SHARED_SECONDS = 60.0  # maximum delay until a shared disk shows new files to all processes
LOG_SECONDS = 10.0


class DataWait:
    """Waits, on all processes together, for data that is still being prepared.

    Each process checks the disk, but none continues before all can continue. A process that waited by itself would not
    notice a signal to another process, or a failure of the preparation, which is a child of the main process.

    Args:
        stop: ends a wait on all processes if it is set on any process.
        complete: returns whether this process sees all of the data. Once all processes do, calls no longer wait.
    """

    def __init__(
        self, world: World, preparation: BackgroundPreparation, stop: StopRequest, complete: Callable[[], bool]
    ) -> None:
        self._world, self._preparation, self._stop = world, preparation, stop
        self._complete, self._over = complete, False

    def __call__(self, ready: Callable[[], bool]) -> bool:
        """Wait until ``ready()`` on every process. Returns False if the run is asked to stop before.

        Raises:
            ValueError: on every process: the preparation has failed.
        """
        began = logged = others_waited = time.monotonic()
        while not self._over:
            there, problem = self._look(ready)
            others_waited = others_waited if there and self._world.is_main else time.monotonic()
            if time.monotonic() > others_waited + SHARED_SECONDS:
                problem = "data.root: not all processes see the data prepared there; put it on a disk that they share"
            mine = [not there, bool(self._stop), problem is not None, not self._complete()]
            missing, asked, problems, growing = self._world.sum(torch.tensor(mine, dtype=torch.int64)).tolist()
            if problems:
                raise ValueError(next(text for text in self._world.gather_objects(problem) if text is not None))
            self._over = not growing
            if not missing or asked:
                return not missing
            if (now := time.monotonic()) > logged + LOG_SECONDS:
                logged, tokens = now, self._preparation.prepared_tokens()
                logger.info("training has waited %.0f s for data: %s tokens prepared", now - began, f"{tokens:,}")
            time.sleep(POLL_SECONDS)
        return True

    def _look(self, ready: Callable[[], bool]) -> tuple[bool, str | None]:
        """Whether this process is ready, and the reason if it can never be ready."""
        try:
            return ready(), self._preparation.problem()
        except (ValueError, OSError) as error:
            return False, str(error)


def prepare_data(config: Config, world_size: int) -> Callable[[World], AbstractContextManager[PreparedDataset]]:
    """Check the settings and the run folder, and prepare the data unless ``data.on_the_fly`` is set.

    Args:
        world_size: number of processes.

    Returns:
        A function that takes the ``World`` of a process and returns a context with the dataset. With
        ``data.on_the_fly``, the data is prepared while this context is open, see ``stream``.

    Raises:
        ValueError, OSError: a setting or a file is wrong; the message names the cause and the fix.
    """
    if config.data.on_the_fly:
        prepared = check_run(config, world_size)
        if prepared is None:
            return partial(stream, config)
    else:
        prepared = ready(config, world_size)
    return lambda world: nullcontext(prepared)


@contextmanager
def stream(config: Config, world: World) -> Iterator[StreamedDataset]:
    """A context with the data of ``config``, which waits until there is enough to begin training.

    While the context is open, a child of the main process prepares the rest of the data.

    Raises:
        ValueError: on every process: a problem of the text, or a tokenizer that does not match the run.
    """
    found = list[StreamedDataset]()

    def opened() -> bool:
        if not found and (data := preparation.dataset(validation_tokens(config))):
            found.append(data)
        return bool(found)

    with BackgroundPreparation(data_settings(config), start=world.is_main) as preparation:
        DataWait(world, preparation, StopRequest(), complete=lambda: False)(opened)
        check_tokenizer(config, found[0].tokenizer)
        yield found[0]


def ready(config: Config, world_size: int) -> PreparedDataset:
    """Check the settings and the run folder for ``world_size`` processes, and prepare the data.

    Raises:
        ValueError, OSError: a setting or a file is wrong; the message names the cause and the fix.
    """
    prepared = check_run(config, world_size) or prepare(data_settings(config))
    check_tokenizer(config, prepared.tokenizer)
    return prepared


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer of the data with the size of the embedding, and with the tokenizer at train.init_from.

    A run that resumes skips the comparison with train.init_from.

    Raises:
        ValueError: they do not match.
    """
    require_embeddings(tokenizer, config.model.vocab_size)
    if (unused := config.model.vocab_size - tokenizer.vocab_size) > 0:
        logger.info("%d of %d embedding rows have no token in the tokenizer", unused, config.model.vocab_size)
    if config.train.init_from and state_to_resume(config) is None:
        require_same_tokenizer(config.train.init_from, tokenizer)


def check_run(config: Config, world_size: int) -> PreparedDataset | None:
    """Check the settings and the run folder, before any data is prepared.

    Returns:
        The data of a resumed run if its corpus is missing, see ``find_trained_data``; otherwise None.

    Raises:
        ValueError, OSError: a setting or a file is wrong; the message names the cause and the fix.
    """
    state = state_to_resume(config)
    trained = find_trained_data(config, state) if state else None
    check(config, world_size, needs_data=trained is None, resumes=state is not None)
    RunFolder(config).check(config)
    require_writable(config.run.root, config.run.name)
    starts = state is None and config.train.init_from
    if starts and config.data.tokenizer is None and find(data_settings(config)) is None:
        require_same_tokenizer(starts, None)  # before the data is prepared with a new tokenizer
    return trained
