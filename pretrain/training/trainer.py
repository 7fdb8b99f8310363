"""The training loop: step, log, validate, save, and at the end write samples and a summary."""

import json
import logging
import math
import platform
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from data.atomic import write_atomic
from data.loading.batches import TrainBatches, validation_batches
from data.loading.prefetch import Prefetch
from data.streaming.background import StreamedDataset
from data.token_dataset import PreparedDataset
from models.flops import flops_per_token, parameter_counts, peak_flops
from optim.schedule import rate_factor
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.directory import HALF_WAY, Damaged, keep, newest_good, point_at, prune, set_aside
from pretrain.checkpoint.saver import Saver
from pretrain.cli.console import log_to_file
from pretrain.cli.signals import StopRequest
from pretrain.config.schema import Config
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.inference.hf_assets import ASSETS_FOLDER
from pretrain.inference.init_from import keep_assets, read_weights_at
from pretrain.inference.scoring import evaluate
from pretrain.runs.code_version import git_commit
from pretrain.runs.folder import RunFolder
from pretrain.runs.metric_log import MetricLog
from pretrain.setup.compiling import compile_blocks, compile_seconds
from pretrain.setup.consistency import require_same_weights
from pretrain.setup.data import Waiting
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.first_rows import choose_first_rows
from pretrain.training.guards import MOST_SKIPPED_IN_A_ROW, RolledBack, SpikeWatch, bad_batch, in_short
from pretrain.training.profiler import StepProfile
from pretrain.training.samples import make_samples, write_samples
from pretrain.training.throughput import Stopwatch, peak_bytes
from pretrain.training.train_step import StepResult, TrainStep

logger = logging.getLogger(__name__)


class Trainer:
    """One process of a run: its model, optimizer, data and place in the schedule.

    Construction builds everything and resumes from the newest checkpoint; ``fit`` trains to the end.
    """

    def __init__(self, config: Config, world: World, data: PreparedDataset, folder: RunFolder, stop: StopRequest):
        self.config, self.world, self.data, self.folder, self.stop = config, world, data, folder, stop
        train = config.train
        self.micro_batch_size = train.micro_batch_size or train.tokens_per_step // train.seq_len // world.size
        changes, self.rollbacks, resume_from, damaged = self._look_into_folder()
        start = read_weights_at(train.init_from) if train.init_from and resume_from is None else None
        self.engine = build_engine(train, world)
        self.model = build_model(config, world.device, start, self.engine.shard)
        self.engine.wrap(self.model)
        self.optim = build_optimizer(config, self.model)
        self.rate = partial(
            rate_factor, total=train.steps, schedule=config.optim.schedule, warmup=config.optim.warmup_steps,
            final=config.optim.final_lr, decay_share=config.optim.decay_share,
        )  # fmt: skip
        self.batches = TrainBatches(
            data.train, train.seq_len, train.tokens_per_step // train.seq_len, self.micro_batch_size,
            train.seed, world.rank, world.size, train.document_masks,
            config.data.shuffle_block if config.data.on_the_fly else None,
        )  # fmt: skip
        self.waiting: Waiting | None = None
        if isinstance(data, StreamedDataset):
            self.waiting = Waiting(world, data.preparation, stop, lambda: data.train.complete)
        self.ahead = Prefetch(self.batches.micro_batches, world.device.type == "cuda", self.batches.ready)
        self.watch = Stopwatch()
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self.skipped_at, self.skipped_in_a_row = 0, 0
        self.first_bad = torch.zeros((), dtype=torch.int64, device=world.device)  # the first step that was not finite
        self.spikes = SpikeWatch(train.spike_factor)
        if resume_from is not None:
            self._load(resume_from)
        require_same_weights(checkpoint.tensors_of(self.model, self.optim), world)
        self._open_folder(changes, resume_from, damaged)  # only now: what is refused above leaves the folder as it was
        if train.compile:
            compile_blocks(config, self.model, world)
        self.update = TrainStep(config, world, self.model, self.engine, self.optim, train.non_finite == "skip")
        self.flops_per_token = flops_per_token(self.model, train.seq_len)
        self.saver = Saver(
            folder.checkpoints, world, background=train.async_save and train.checkpoint_every != 1,
            keep_last=train.keep_last, keep_every=train.keep_every, timeout=timedelta(minutes=train.timeout_minutes),
        )  # fmt: skip
        self.compile_seconds = 0.0  # that were logged
        self.peak_flops = peak_flops(world.device, train.dtype, train.matmul_precision)
        self.metrics = MetricLog(folder, config, self.step) if world.is_main else None
        self.commit = git_commit() if world.is_main else None  # now: the code may change while the run goes on

    # What a run does, from the outside in.

    def fit(self) -> bool:
        """Train to the last step. Returns False when a signal stopped the run, which is then saved."""
        self.began = time.perf_counter()
        try:
            return self._fit()
        except (OSError, ValueError, FloatingPointError):
            self.saver.wait()  # the run ends; what it has saved is to be there
            raise

    def _fit(self) -> bool:
        total = self.config.train.steps
        if self.step < total and not self._await_data(self.step):
            return self._stopped()
        if self.optim.grass and self.step == 0:
            count = self.batches.targets(0)
            choose_first_rows(self.optim.grass, self.update, list(self.batches.micro_batches(0)), count)
        if self.step == 0 and self.config.train.eval_every:
            self.validate()
        profiled = self.config.train.profile if self.world.is_main else 0
        with StepProfile(profiled, self.folder.profile, self.world.device) as profile:
            for step in range(self.step, total):
                self.watch.start()
                if not self._await_data(step):
                    self.save()
                    return self._stopped()
                self._step_and_log(step)
                if self.config.train.spike_factor and self.sums is not None:
                    self._look_for_spike()
                self.saver.look()
                profile.step()
                asked = self.world.any(bool(self.stop))
                if self._due(self.config.train.checkpoint_every) or asked:
                    self.save()
                elif self._half_way():
                    self.save(half_way=True)
                if self._due(self.config.train.eval_every):
                    self.validate()
                if asked and self.step < total:
                    return self._stopped()
        self._finish()
        return True

    def _step_and_log(self, step: int) -> None:
        logged = (step + 1) % self.config.train.log_every == 0 or step + 1 == self.config.train.steps
        self.sums = None if step + 1 in self.rollbacks else self.train_step(step)
        self.step = step + 1
        if self.sums is None:
            self.optim.skip()
            self._skip("passed over: the loss jumped here")
        elif self.sums.skipped:
            self._skip("skipped: loss or gradient not finite")
        else:
            self._note_non_finite()
        values = self._values() if logged else {}
        self.watch.stop(self.config.train.tokens_per_step)
        if logged:
            self._log(values)

    def _await_data(self, step: int) -> bool:
        """Wait, on the fly, for the data of a step; False when the run is asked to stop before they are there."""
        if self.waiting is None:
            return True
        began = time.perf_counter()
        try:
            return self.waiting(lambda: self.batches.ready(step))
        except ValueError:
            if self.step:
                self.save()
            raise
        finally:
            self.ahead.add(time.perf_counter() - began)

    def train_step(self, step: int) -> StepResult:
        """One update."""
        self.optim.set_rates(self.rate(step))
        return self.update(self.ahead(step), self.batches.targets(step))

    # What is written down.

    def _values(self) -> dict[str, float | None]:
        """The numbers of the latest step, which wait for the device: asked for when it is logged or saved.

        None for a step that was not made.
        """
        if self.sums is None or self.sums.skipped:
            return {"train/loss": None, "train/grad_norm": None}
        numbers = self.sums.reduce(self.world, self.first_bad > 0)
        if not numbers.finite:
            self._stop_at_non_finite(numbers.loss, numbers.grad_norm)
        return {"train/loss": numbers.loss, "train/grad_norm": numbers.grad_norm}

    # Steps that go wrong.

    def _note_non_finite(self) -> None:
        """Keep, on the device and without waiting for it, which step was the first that was not finite."""
        assert self.sums is not None
        bad = (self.first_bad == 0) & ~self.sums.finite()
        self.first_bad = torch.where(bad, self.step, self.first_bad)

    def _stop_at_non_finite(self, loss: float, norm: float) -> NoReturn:
        first = min(step for step in self.world.gather_objects(int(self.first_bad) or self.step))
        documents = self._tell_bad_batch(first, "stopped: loss or gradient not finite", loss=loss, grad_norm=norm)
        self.saver.wait()
        newest = self.folder.latest_checkpoint
        raise FloatingPointError(
            f"the training loss is {loss} and the gradient's norm {norm} at step {self.step}"
            f"{f', not finite since step {first}' if first < self.step else ''}: lower optim.lr or optim.linear_lr, or "
            f"set train.non_finite=skip; the batch of step {first} has {in_short(documents)}, all of them named in "
            f"{self.folder.bad_batches_file}; the newest checkpoint is {newest or 'none'}"
        )

    def _skip(self, what: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row = 1 if self.step != self.skipped_at + 1 else self.skipped_in_a_row + 1
        self.skipped_at = self.step
        documents = self._tell_bad_batch(self.step, what)
        logger.warning("step %d is %s; its batch has %s", self.step, what, in_short(documents))
        if self.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step}, have a loss or gradient that is not "
                f"finite: lower optim.lr or optim.linear_lr; {self.folder.bad_batches_file} names their documents"
            )

    def _tell_bad_batch(self, step: int, what: str, **numbers: float) -> list[str]:
        documents = self.batches.documents(step - 1)
        if self.metrics:
            self.metrics.write_bad_batch(bad_batch(step, what, documents, **numbers))
        return documents

    def _look_for_spike(self) -> None:
        """Go back to the newest checkpoint when the loss has jumped; waits for the device.

        Raises:
            RolledBack: the folder says now which batch to pass over.
        """
        loss = self._values()["train/loss"]
        if loss is None or not self.spikes.sees_spike(loss):
            return
        documents = in_short(self.batches.documents(self.step - 1))
        if len(self.rollbacks) >= self.config.train.most_rollbacks:
            logger.warning("the loss jumped to %.4f at step %d; the run went back often enough", loss, self.step)
            self.spikes.losses.append(loss)  # where it stays, it is no jump for long
            return
        logger.warning(
            "the loss jumped to %.4f at step %d, whose batch has %s; going back to the newest checkpoint, and on from "
            "there without this batch",
            *(loss, self.step, documents),
        )
        self.saver.wait()
        if self.metrics:
            write_atomic(self.folder.rollbacks_file, json.dumps({"steps": [*self.rollbacks, self.step]}))
            self.metrics.close({"went_back_at": self.step})
        self.world.barrier()
        raise RolledBack

    def _log(self, values: dict[str, float | None]) -> None:
        tokens_per_s, step_s = self.watch.lap()
        if (compiling := compile_seconds()) - self.compile_seconds > 1:
            logger.info("step %d: compiling has taken %.0f s so far", self.step, compiling)
            self.compile_seconds = compiling
        rates = {f"train/lr_{name}": rate for name, rate in self.optim.rates().items()}
        values |= {
            "train/lr": rates["train/lr_linears"], **rates,
            "perf/tokens_per_s": tokens_per_s, "perf/step_s": step_s, "perf/data_s": self.ahead.lap(),
            "perf/tflops": tokens_per_s * self.flops_per_token / 1e12, "mem/peak_bytes": peak_bytes(self.world.device),
        }  # fmt: skip
        if self.peak_flops:
            values["perf/mfu"] = tokens_per_s * self.flops_per_token / (self.peak_flops * self.world.size)
        if self.optim.grass:
            values |= self.optim.grass.history.means()
        if self.update.skip or self.rollbacks:
            values |= {"train/skipped": self.skipped}
        loss = values["train/loss"]
        self._write(values, {"loss": math.nan if loss is None else loss, "tokens/s": tokens_per_s})
        if self.optim.grass and self.metrics:
            logged_before = (self.step - 1) // self.config.train.log_every * self.config.train.log_every
            self.metrics.write_selection(self.step, self.optim.grass.history.by_layer(since=logged_before))

    def _write(self, values: dict[str, Any], shown: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.write(self.step, self.tokens, values)
            self.metrics.advance(self.step, shown)

    def validate(self) -> dict[str, float]:
        """Score the validation split and log it."""
        train = self.config.train
        batches = validation_batches(
            self.data.val,
            train.seq_len,
            self.micro_batch_size,
            self.world.rank,
            self.world.size,
            train.eval_sequences,
            train.document_masks,
        )
        token_bytes = torch.as_tensor(self.data.tokenizer.token_bytes, dtype=torch.int64, device=self.world.device)
        with torch.compiler.set_stance("force_eager"):  # no second, gradient-free graph to compile
            score = evaluate(self.model, batches, token_bytes, self.world).metrics
        self._write(score, {"val loss": score["val/loss"], "val perplexity": score["val/perplexity"]})
        return score

    @property
    def tokens(self) -> int:
        return self.step * self.config.train.tokens_per_step

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.config.train.steps

    def _half_way(self) -> bool:
        """Whether the run is half-way between two checkpoints that are saved while it goes on.

        A kill during a save costs the steps since the save before: with one at the half, an interval at the most.
        """
        train = self.config.train
        half = train.checkpoint_every // 2
        return train.async_save and half > 0 and self.step % train.checkpoint_every == half and self.step < train.steps

    # Beginning, saving, ending.

    def _look_into_folder(self) -> tuple[list[str], list[int], Path | None, list[Damaged]]:
        """What changed since the run began, which steps to pass over, what to resume from and what cannot be.

        As the main process finds it.
        """
        found: Any = None
        if self.world.is_main:
            try:
                found = self.folder.check(self.config), self.folder.rollbacks, *newest_good(self.folder.checkpoints)
            except ValueError as error:
                found = error
        found = self.world.broadcast_object(found)
        if isinstance(found, ValueError):
            raise found
        return found

    def _open_folder(self, changes: list[str], resume_from: Path | None, damaged: list[Damaged]) -> None:
        if self.world.is_main:
            asides = [set_aside(error) for error in damaged]
            self.folder.open(self.config, self.step)
            if resume_from:
                point_at(resume_from)  # the process that wrote it may have been killed before it could
                prune(self.folder.checkpoints, self.config.train.keep_last, self.config.train.keep_every)
            self.data.tokenizer.copy_to(self.folder.path)
            if self.config.train.init_from and resume_from is None:
                keep_assets(self.config.train.init_from, self.folder.path / ASSETS_FOLDER)
            log_to_file(self.folder.log_file)
            for error, aside in zip(damaged, asides, strict=True):
                logger.warning("%s is damaged (%s); it is now %s", error.path, error.what, aside.name)
        for change in changes:
            logger.info("changed since the run began: %s", change)
        if self.step:
            logger.info("going on from step %d", self.step)

    def _data_identity(self, step: int) -> dict[str, Any]:
        read = {"read": self.batches.digest(step)} if self.waiting else {}
        return {"fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer.sha256, **read}

    def _load(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        if self.waiting and state["step"]:
            self.waiting(lambda: self.batches.ready(state["step"] - 1))
        if state["data"] != self._data_identity(state["step"]):
            raise ValueError(
                f"{path} was trained on another corpus or tokenizer than {self.data.folder}; bring that one back, or "
                "choose another run.name"
            )
        checkpoint.load(path, self.model, self.optim)
        self.step, self.seconds = state["step"], state["seconds"]
        self.watch.total_seconds = state["training_seconds"]
        self.skipped = state.get("skipped", 0)
        self.spikes.losses.extend(state.get("losses", []))
        self.optim.resume(self.step)

    def save(self, half_way: bool = False) -> None:
        """Have a checkpoint of the present step written, unless there is one; ``half_way``, until there is a newer."""
        self.saver.wait()
        path = checkpoint.path_of(self.folder.checkpoints, self.step)
        if path.exists():
            if self.world.is_main and not half_way:
                keep(path)
            return
        if self.step:
            self._values()  # raises before a state that is not finite could be saved
        state = {
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds + time.perf_counter() - self.began,
            "training_seconds": self.watch.total_seconds, "world_size": self.world.size,
            "data": self._data_identity(self.step),
            "skipped": self.skipped, "losses": list(self.spikes.losses), HALF_WAY: half_way,
        }  # fmt: skip
        self.saver.save(self.step, checkpoint.tensors_of(self.model, self.optim), state)

    def _stopped(self) -> bool:
        self.saver.finish()
        logger.info("stopped by a signal at step %d; the same command goes on from here", self.step)
        if self.metrics:
            self.metrics.close({"stopped_at": self.step})
        return False

    def _finish(self) -> None:
        self.save()
        summary: dict[str, Any] = {**self.validate(), **parameter_counts(self.model)}
        made = self.metrics or self.engine.sharded
        samples = make_samples(self.model, self.data.tokenizer, self.config) if made else []
        self.saver.finish()
        if not self.metrics:
            return
        seconds = self.seconds + time.perf_counter() - self.began
        summary |= {
            "steps": self.step, "tokens": self.tokens, "tokens_per_s": self.tokens / self.watch.total_seconds,
            "training_seconds": self.watch.total_seconds, "wall_seconds": seconds,
            "compile_seconds": compile_seconds(),
            "peak_bytes": peak_bytes(self.world.device), "world_size": self.world.size,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "commit": self.commit,
            "machine": platform.platform(),
        }  # fmt: skip
        if samples:
            write_samples(self.folder.samples_file, samples, f"{self.config.run.name} at step {self.step}")
        write_atomic(self.folder.summary_file, json.dumps(summary, indent=1) + "\n")
        self.metrics.show_results(samples)
        self.metrics.close(summary)
        logger.info("finished: validation loss %.4f; see %s", summary["val/loss"], self.folder.path)
