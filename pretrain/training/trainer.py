"""The training loop."""

import logging
from enum import Enum
from typing import Any

import torch

from data.token_dataset import PreparedDataset
from pretrain.checkpoint.manager import CheckpointManager
from pretrain.checkpoint.tensors import tensors_of
from pretrain.cli.console import log_to_file
from pretrain.cli.signals import StopRequest
from pretrain.config.schema import Config
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.inference.hf_assets import ASSETS_FOLDER
from pretrain.inference.init_from import InitialWeights, keep_assets, require_same_start
from pretrain.runs.folder import RunFolder
from pretrain.setup.compiling import compile_blocks
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.setup.rank_agreement import require_same_weights
from pretrain.training.announcements import log_opening
from pretrain.training.batch_feed import BatchFeed
from pretrain.training.guards import Guards, Verdict
from pretrain.training.initial_rows import choose_initial_rows
from pretrain.training.layer_norms import LayerNorms
from pretrain.training.profiler import StepProfile
from pretrain.training.rates import describe_change, rate_settings, schedule_factor
from pretrain.training.samples import make_samples
from pretrain.training.state import TrainingState
from pretrain.training.step_log import StepLog
from pretrain.training.throughput import Stopwatch
from pretrain.training.train_step import StepResult, TrainStep
from pretrain.training.validation import evaluate

logger = logging.getLogger(__name__)
Outcome = Enum("Outcome", ["FINISHED", "STOPPED", "ROLLED_BACK"])


class Trainer:
    """Trains a run, on one of its processes: builds model and optimizer, and resumes from the newest checkpoint.

    ``step`` is the number of steps made. Call every method on all processes.

    Args:
        data: the prepared tokens, with their tokenizer.
        folder: the run's folder, for checkpoints, metrics and logs.
        stop: asks the run to stop after the current step.

    Raises:
        ValueError: the run cannot be resumed with this configuration or data.
        OSError: a file of the run, or the weights at ``train.init_from``, cannot be read or written.
    """

    def __init__(self, config: Config, world: World, data: PreparedDataset, folder: RunFolder, stop: StopRequest):
        self.config, self.world, self.folder, self.stop_request = config, world, folder, stop
        train = config.train
        changes = world.on_main(lambda: folder.check(config))
        self.checkpoints = CheckpointManager(folder.checkpoints, folder.rollbacks_file, train, world)
        state = self.checkpoints.state()
        start = InitialWeights(train.init_from) if train.init_from and not state else None
        engine = build_engine(train, world)
        self.model = build_model(config, world.device, start, engine.shard)
        engine.wrap(self.model)
        self.init_from = start.identity() if start else None
        self.optim = build_optimizer(config, self.model)
        self.feed = BatchFeed(config, world, data, stop)
        self.guards = Guards(train, world, self.feed.batches, folder, self.checkpoints.rollbacks)
        self.watch, self.step = Stopwatch(), 0
        if state:
            self.load_state_dict(state)
            changes += describe_change(state.get("rates"), config, self.step)
        require_same_weights(tensors_of(self.model, self.optim), world)
        self._open_folder(changes)  # only now, so that a run that is refused above does not change its folder
        log_opening(config, world, self.model, self.optim, data)
        if train.compile:
            compile_blocks(config, self.model, world)
        self.norms = LayerNorms(self.model, self.optim, train.log_layers_every) if train.log_layers_every else None
        observers, skip = [self.norms] if self.norms else [], train.non_finite == "skip"
        self.update = TrainStep(config, world, self.model, engine, self.optim, skip, observers)
        self.log = StepLog(config, world, folder, self.model, self.optim, self.watch, self.step)

    def fit(self) -> Outcome:
        """Train to the last step.

        Returns:
            The ``Outcome``: FINISHED; STOPPED after a signal; ROLLED_BACK if a new Trainer must continue from the
            newest checkpoint.

        Raises:
            FloatingPointError: a loss, or a tensor to be saved, is not finite.
            OSError: the disk failed.
            ValueError: a data file cannot be read, or the preparation of the data failed.
        """
        self.watch.begin()
        self.stop_request.step = self.step + 1
        try:
            return self._fit()
        except (OSError, ValueError, FloatingPointError):
            self.checkpoints.wait()  # before the process ends, the running save is completed
            raise

    def _fit(self) -> Outcome:
        train, world = self.config.train, self.world
        if self.step < train.steps and not self._wait_for_batch():
            return self.stop()
        if self.step == 0 and self.optim.grass:
            choose_initial_rows(self.optim.grass, self.update, self.feed.micro_batches(0), self.feed.batches.targets(0))
        if self.step == 0 and train.eval_every:
            self.validate()
        with StepProfile(train.profile if world.is_main else 0, self.folder.profile, world.device) as profile:
            while self.step < train.steps:
                self.watch.start()
                # 1. Wait for the batch of the step, or stop.
                if not self._wait_for_batch():
                    return self.stop()
                # 2. Train the step.
                result = self.train_step(self.step)
                self.step += 1
                # 3. Judge its result, with its numbers if they are needed now.
                asked = world.any(bool(self.stop_request))
                self.stop_request.step = self.step + 1
                logs, saves = self.log.due(self.step), asked or self.checkpoints.due(self.step)
                verdict = self.guards.judge(self.step, result, reduce=logs or saves)
                self.watch.stop(train.tokens_per_step)
                if verdict is Verdict.FAIL:
                    self.checkpoints.wait()
                    newest = self.folder.latest_checkpoint or "none"
                    raise FloatingPointError(f"{self.guards.reason}\nthe newest checkpoint: {newest}")
                # 4. Log it.
                self.log.advance(self.step)
                if logs:
                    self.log.step(self.step, result, self.feed.ahead.lap(), self.guards.skips)
                if self.norms and not result.skipped:
                    self.log.layers(self.step, self.norms.take())
                if verdict is Verdict.ROLL_BACK:
                    self.checkpoints.roll_back(self.step)
                    self.log.close({"went_back_at": self.step})
                    return Outcome.ROLLED_BACK
                # 5. Advance the profiler.
                profile.step()
                # 6. Save.
                self.checkpoints.poll()
                if saves:
                    self._save()
                # 7. Validate.
                if train.eval_every and self.step % train.eval_every == 0 and self.step < train.steps:
                    self.validate()
                # 8. Stop.
                if asked and self.step < train.steps:
                    return self.stop()
        return self.finish()

    def train_step(self, step: int) -> StepResult:
        """Make the update of ``step`` (from 0), or skip its batch after a rollback."""
        self.optim.set_rates(schedule_factor(self.config, step))
        if self.norms:
            self.norms.start(step + 1)
        if self.guards.leaves_out(step + 1):
            return self.update.leave_out()
        return self.update(self.feed.micro_batches(step), self.feed.batches.targets(step))

    def validate(self) -> dict[str, float]:
        """Score the validation split, log the metrics (``val/…``) and return them."""
        with torch.compiler.set_stance("force_eager"):  # a second graph, without gradients, is not worth compiling
            score = evaluate(self.model, self.feed.validation(), self.feed.data.tokenizer, self.world)
        self.log.validation(self.step, score.metrics)
        return score.metrics

    def stop(self) -> Outcome:
        """Save and close a run that is not finished. Raises NotSaved if the checkpoint cannot be written."""
        self._save()
        self.checkpoints.finish()
        logger.info("stopped by a signal at step %d; the same command resumes the run from here", self.step)
        self.log.close({"stopped_at": self.step})
        return Outcome.STOPPED

    def finish(self) -> Outcome:
        """Save, validate, write samples and the summary. Raises NotSaved if the checkpoint cannot be written."""
        self.stop_request.step = None
        self._save()
        score = self.validate()
        generates = self.world.is_main or self.update.engine.sharded
        samples = make_samples(self.model, self.feed.data.tokenizer, self.config) if generates else []
        self.checkpoints.finish()
        self.log.summary(self.step, score, samples)
        return Outcome.FINISHED

    def state_dict(self) -> dict[str, Any]:
        """The JSON-serialisable state of the run, except its tensors: see ``TrainingState``."""
        return TrainingState(
            step=self.step, tokens=self.log.tokens(self.step), seconds=self.watch.wall_seconds,
            training_seconds=self.watch.total_seconds, world_size=self.world.size,
            data=self.feed.identity(self.step), skipped=self.guards.skipped, losses=list(self.guards.losses),
            rates=rate_settings(self.config), init_from=self.init_from,
        ).to_json()  # fmt: skip

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` and the tensors of a checkpoint. Raises ValueError if the data differ."""
        state, changes = TrainingState.from_json(content), self.folder.changes(self.config)
        if "train.init_from" in changes:
            require_same_start(self.config.train.init_from, state.init_from)
        self.feed.require_same(state.data, state.step, self.checkpoints.resume_from, changes)
        self.checkpoints.load(self.model, self.optim)
        self.step, self.init_from = state.step, state.init_from
        self.watch.resume(state.seconds, state.training_seconds)
        self.guards.resume(state.skipped, state.losses)
        self.optim.resume(self.step)

    def _open_folder(self, changes: list[str]) -> None:
        if self.world.is_main:
            self.folder.open(self.config, self.step)
            log_to_file(self.folder.log_file)
            self.checkpoints.open()
            self.feed.data.tokenizer.copy_to(self.folder.path)
            if self.config.train.init_from and not self.step:
                keep_assets(self.config.train.init_from, self.folder.path / ASSETS_FOLDER)
        for change in changes:
            logger.warning("changed since the run began: %s", change)
        if self.step:
            logger.info("resuming from step %d", self.step)

    def _wait_for_batch(self) -> bool:
        try:
            return self.feed.wait(self.step)
        except ValueError:  # the preparation failed; the training so far is kept
            self._save()
            raise

    def _save(self) -> None:
        if self.step:
            self.checkpoints.save(self.step, tensors_of(self.model, self.optim), self.state_dict())
