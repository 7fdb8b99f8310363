"""The training loop: step, log, validate, save, and at the end write samples and a summary."""

import json
import logging
import math
import platform
import resource
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import TrainBatches, validation_batches
from data.prefetch import Prefetch
from data.prepare import Prepared
from optim.build import set_rates
from optim.schedule import rate_factor
from pretrain import checkpoint
from pretrain.agreement import require_same_weights
from pretrain.build import build_model, build_optimization, compile_blocks
from pretrain.checkpoint_folder import Damaged, newest_good, set_aside
from pretrain.code_version import git_commit
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.evaluate import evaluate
from pretrain.files import write_whole
from pretrain.flops import flops_per_token, parameter_counts
from pretrain.generate import generate
from pretrain.interrupt import StopRequest
from pretrain.metrics import MetricLog, Stopwatch, log_to_file
from pretrain.parallel import engine_of
from pretrain.run_folder import RunFolder
from pretrain.saver import Saver
from pretrain.trained import weights_at
from pretrain.update import Update

logger = logging.getLogger(__name__)


class Trainer:
    """One process of a run: its model, optimizer, data and place in the schedule.

    Construction builds everything and resumes from the newest checkpoint; ``fit`` trains to the end.
    """

    def __init__(self, config: Config, world: World, data: Prepared, folder: RunFolder, stop: StopRequest):
        self.config, self.world, self.data, self.folder, self.stop = config, world, data, folder, stop
        train = config.train
        self.micro_batch_size = train.micro_batch_size or train.tokens_per_step // train.seq_len // world.size
        changes, resume_from, damaged = self._look_into_folder()
        start = weights_at(train.init_from) if train.init_from and resume_from is None else None
        self.engine = engine_of(train, world)
        self.model = build_model(config, world.device, start, self.engine.shard)
        self.engine.wrap(self.model)
        self.optim = build_optimization(config, self.model)
        self.rate = partial(
            rate_factor, total=train.steps, schedule=config.optim.schedule, warmup=config.optim.warmup_steps,
            final=config.optim.final_lr, decay_share=config.optim.decay_share,
        )  # fmt: skip
        self.batches = TrainBatches(
            data.train, train.seq_len, train.tokens_per_step // train.seq_len, self.micro_batch_size,
            train.seed, world.rank, world.size, train.document_masks,
        )  # fmt: skip
        self.ahead = Prefetch(self.batches.micro_batches, pin=world.device.type == "cuda")
        self.watch = Stopwatch()
        self.step, self.seconds = 0, 0.0
        if resume_from is not None:
            self._load(resume_from)
        require_same_weights(checkpoint.tensors_of(self.model, self.optim), world)
        self._open_folder(changes, damaged)  # only now: what is refused above leaves the folder as it was
        if train.compile:
            compile_blocks(self.model, world.device)
        self.update = Update(config, world, self.model, self.engine, self.optim)
        self.flops_per_token = flops_per_token(self.model, train.seq_len)
        self.saver = Saver(
            folder.checkpoints, world, background=train.async_save, keep_last=train.keep_last,
            keep_every=train.keep_every, timeout=timedelta(minutes=train.timeout_minutes),
        )  # fmt: skip
        self.metrics = MetricLog(folder, config, self.step) if world.is_main else None
        self.commit = git_commit() if world.is_main else None  # now: the code may change while the run goes on

    # What a run does, from the outside in.

    def fit(self) -> bool:
        """Train to the last step. Returns False when a signal stopped the run, which is then saved."""
        total = self.config.train.steps
        self.began = time.perf_counter()
        if self.optim.grass and self.step == 0:
            count = self.batches.targets(0)
            self.optim.grass.start(lambda: self.update.accumulate(self.batches.micro_batches(0), count))
        if self.step == 0 and self.config.train.eval_every:
            self.validate()
        for step in range(self.step, total):
            self._step_and_log(step)
            self.saver.look()
            asked = self.world.any(bool(self.stop))
            if self._due(self.config.train.checkpoint_every) or asked:
                self.save()
            if self._due(self.config.train.eval_every):
                self.validate()
            if asked and self.step < total:
                return self._stopped()
        self._finish()
        return True

    def _step_and_log(self, step: int) -> None:
        logged = (step + 1) % self.config.train.log_every == 0 or step + 1 == self.config.train.steps
        self.watch.start()
        self.sums = self.train_step(step)
        self.step = step + 1
        values = self._values() if logged else {}
        self.watch.stop(self.config.train.tokens_per_step)
        if logged:
            self._log(values)

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One update. Returns this process' summed loss in nats and the global gradient norm, still on the device."""
        set_rates(self.optim.optimizer, self.rate(step), self.optim.grass.rate_factor() if self.optim.grass else 1.0)
        return self.update(self.ahead(step), self.batches.targets(step))

    # What is written down.

    def _values(self) -> dict[str, float]:
        """The numbers of the latest step, which wait for the device: asked for when it is logged or saved."""
        nats, grad_norm = self.sums
        loss = self.world.sum(nats.clone()).item() / self.batches.targets(self.step - 1)
        if not math.isfinite(loss) or not math.isfinite(grad_norm.item()):
            raise FloatingPointError(
                f"the training loss is {loss} and the gradient's norm {grad_norm.item()} at step {self.step}: "
                f"lower optim.lr or optim.linear_lr; {self.folder.checkpoints} holds the steps before"
            )
        return {"train/loss": loss, "train/grad_norm": grad_norm.item()}

    def _log(self, values: dict[str, float]) -> None:
        tokens_per_s, step_s = self.watch.lap()
        rates = {f"train/lr_{g['name']}": float(g["lr"]) for g in self.optim.optimizer.param_groups}
        values |= {
            "train/lr": rates["train/lr_linears"], **rates,
            "perf/tokens_per_s": tokens_per_s, "perf/step_s": step_s, "perf/data_s": self.ahead.lap(),
            "perf/tflops": tokens_per_s * self.flops_per_token / 1e12, "mem/peak_bytes": peak_bytes(self.world.device),
        }  # fmt: skip
        if self.optim.grass:
            values |= self.optim.grass.history.means()
        self._write(values, {"loss": values["train/loss"], "tokens/s": tokens_per_s})
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

    # Beginning, saving, ending.

    def _look_into_folder(self) -> tuple[list[str], Path | None, list[Damaged]]:
        """What changed since the run began, what to resume from and what cannot be, as the main process finds it."""
        found: Any = None
        if self.world.is_main:
            try:
                found = self.folder.check(self.config), *newest_good(self.folder.checkpoints)
            except ValueError as error:
                found = error
        found = self.world.from_main(found)
        if isinstance(found, ValueError):
            raise found
        return found

    def _open_folder(self, changes: list[str], damaged: list[Damaged]) -> None:
        if self.world.is_main:
            asides = [set_aside(error) for error in damaged]
            self.folder.open(self.config, self.step)
            self.data.tokenizer.copy_to(self.folder.path)
            log_to_file(self.folder.log_file)
            for error, aside in zip(damaged, asides, strict=True):
                logger.warning("%s is damaged (%s); it is now %s", error.path, error.what, aside.name)
        for change in changes:
            logger.info("changed since the run began: %s", change)
        if self.step:
            logger.info("going on from step %d", self.step)

    def _data_identity(self) -> dict[str, Any]:
        return {"fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer.sha256}

    def _load(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        if state["data"] != self._data_identity():
            raise ValueError(
                f"{path} was trained on another corpus or tokenizer than {self.data.folder}; bring that one back, or "
                "choose another run.name"
            )
        checkpoint.load(path, self.model, self.optim)
        self.step, self.seconds = state["step"], state["seconds"]
        self.watch.total_seconds = state["training_seconds"]
        if self.optim.grass:
            self.optim.grass.resume(self.step)

    def save(self) -> None:
        """Have a checkpoint of the present step written, unless there is one."""
        if self.step:
            self._values()  # raises before a state that is not finite could be saved
        state = {
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds + time.perf_counter() - self.began,
            "training_seconds": self.watch.total_seconds, "world_size": self.world.size, "data": self._data_identity(),
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
        samples = self._samples() if self.metrics or self.engine.sharded else []
        self.saver.finish()
        if not self.metrics:
            return
        seconds = self.seconds + time.perf_counter() - self.began
        summary |= {
            "steps": self.step, "tokens": self.tokens, "tokens_per_s": self.tokens / self.watch.total_seconds,
            "training_seconds": self.watch.total_seconds, "wall_seconds": seconds,
            "peak_bytes": peak_bytes(self.world.device), "world_size": self.world.size,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "commit": self.commit,
            "machine": platform.platform(),
        }  # fmt: skip
        if samples:
            self._write_samples(samples)
        write_whole(self.folder.summary_file, json.dumps(summary, indent=1) + "\n")
        self.metrics.show_results(samples)
        self.metrics.close(summary)
        logger.info("finished: validation loss %.4f; see %s", summary["val/loss"], self.folder.path)

    def _samples(self) -> list[tuple[str, str]]:
        """Each prompt and what the model makes of it, the same on every process."""
        tokenizer, samples = self.data.tokenizer, []
        if self.config.train.sample_tokens == 0:
            return []
        self.model.eval()
        for i, prompt in enumerate(self.config.data.prompts):
            with torch.compiler.set_stance("force_eager"):
                ids = generate(
                    self.model, [tokenizer.bos_id, *tokenizer.encode(prompt)], self.config.train.sample_tokens,
                    temperature=0.8, top_k=50, seed=self.config.train.seed + i, stop=tokenizer.eos_id,
                )  # fmt: skip
            samples.append((prompt, tokenizer.decode(ids)))
        return samples

    def _write_samples(self, samples: list[tuple[str, str]]) -> None:
        """``samples.md``."""
        parts = [f"Prompt: `{prompt!r}`\n\n````text\n{text}\n````\n" for prompt, text in samples]
        heading = f"# Samples of {self.config.run.name} at step {self.step}\n"
        self.folder.samples_file.write_text("\n".join([heading, *parts]), encoding="utf-8")


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: by CUDA's allocator, or, on a CPU, resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024
