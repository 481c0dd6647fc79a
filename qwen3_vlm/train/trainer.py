"""The loop: order of events only."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from qwen3_vlm.checkpoint import layout, sharded
from qwen3_vlm.config.compose import to_dict
from qwen3_vlm.config.schema import RunConfig
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.errors import ConfigError, DataError
from qwen3_vlm.logging import get_logger
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.batches import StepBatch, StepBatches
from qwen3_vlm.train.callbacks import Callback
from qwen3_vlm.train.metrics import StepMetrics, count_reasons
from qwen3_vlm.train.optimizer import ProgressSchedule
from qwen3_vlm.train.step import StepResult, train_step

log = get_logger(__name__)


@dataclass(kw_only=True)
class Progress:
    """How far a run is; kept in every save."""

    step: int = 0
    epoch: int = 0
    """Passes over the data that are complete."""
    samples: int = 0
    """Samples seen, skipped ones included."""
    learned: int = 0
    """Samples that were trained on."""
    samples_at_epoch: int = 0
    """`samples` when the current pass began."""


class Trainer:
    """Drives a run from its start or its latest save to its end.

    Args:
        config: the run.
        topology: where this process stands.
        model: this rank's stage, and `wrapped`, what the schedule drives.
        optimizer, schedule: what updates it.
        batches: the run's data; `loader` is this rank's reader, None where it does not read.
        samples_per_epoch: samples of one pass, as the data's report says.
        total_samples: samples of the whole run, by which it ends and the schedule runs; None if train.max_steps is set.
        source: the checkpoint that the run started from: its tokenizer and image processor go into every save.
        callbacks: watchers; only rank 0 has any.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        topology: Topology,
        model: VLM,
        wrapped: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        schedule: ProgressSchedule,
        batches: StepBatches,
        loader: RowLoader | None,
        samples_per_epoch: int,
        total_samples: int | None,
        source: Path,
        callbacks: Sequence[Callback],
    ):
        self.config = config
        self.topology = topology
        self.model = model
        self.wrapped = wrapped
        self.optimizer = optimizer
        self.schedule = schedule
        self.batches = batches
        self.loader = loader
        self.samples_per_epoch = samples_per_epoch
        self.total_samples = total_samples
        self.source = source
        self.callbacks = callbacks
        self.exp_dir = Path(config.exp_dir)
        self.progress = Progress()

    def fit(self) -> None:
        """Run to the end: resume, then step, record, save."""
        self.resume()
        if self.is_finished():
            log.info("%s is finished, nothing to do: %s", self.exp_dir, self._describe_progress())
            return
        for callback in self.callbacks:
            callback.on_start(self.progress.step)
        try:
            saved_at = self.progress.step
            while not self.is_finished():
                started = time.perf_counter()
                batch = self.batches.next_step()
                if batch is None:
                    self.end_epoch()
                    continue
                result = self.step(batch)
                self.record(batch, result, time.perf_counter() - started)
                if self.progress.step % self.config.checkpoint.save_every == 0:
                    self.save()
                    saved_at = self.progress.step
            if self.progress.learned == 0:
                raise self._nothing_learned()
            if saved_at != self.progress.step:
                self.save()
            log.info("done: %s", self._describe_progress())
        finally:
            for callback in self.callbacks:
                callback.on_end()

    def is_finished(self) -> bool:
        """All steps are done, or all samples seen."""
        if self.config.train.max_steps is not None:
            return self.progress.step >= self.config.train.max_steps
        assert self.total_samples is not None
        return self.progress.samples >= self.total_samples

    def share_done(self) -> float:
        """Share of the run that is done, in 0..1."""
        if self.config.train.max_steps is not None:
            return self.progress.step / self.config.train.max_steps
        assert self.total_samples is not None
        return self.progress.samples / self.total_samples

    def step(self, batch: StepBatch) -> StepResult:
        """Learn from one global batch."""
        seen = batch.counts.samples + batch.counts.skipped
        result = train_step(
            batch,
            model=self.wrapped,
            optimizer=self.optimizer,
            schedule=self.schedule,
            units=1 if self.config.train.max_steps is not None else seen,
            seq_length=self.config.train.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            topology=self.topology,
        )
        self.progress.step += 1
        self.progress.samples += seen
        self.progress.learned += batch.counts.samples
        return result

    def record(self, batch: StepBatch, result: StepResult, seconds: float) -> None:
        """Tell the callbacks."""
        metrics = StepMetrics(
            step=self.progress.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            tokens=batch.counts.tokens,
            loss_tokens=batch.counts.loss_tokens,
            samples=batch.counts.samples,
            images=batch.counts.items,
            skipped=count_reasons([s.reason for s in batch.skipped]),
            step_time_s=seconds,
            tokens_per_s=batch.counts.tokens / seconds,
            images_per_s=batch.counts.items / seconds,
        )
        for callback in self.callbacks:
            callback.on_step(metrics, batch, self.share_done())

    def end_epoch(self) -> None:
        """Count a pass; say so if it held another number of samples than its report.

        Raises:
            DataError: no sample of the pass could be used: going on would never end.
        """
        if self.progress.learned == 0:
            raise self._nothing_learned()
        seen = self.progress.samples - self.progress.samples_at_epoch
        if seen != self.samples_per_epoch:
            log.warning(
                "the pass that ends held %s samples, %s were expected: %s was changed after its preparation",
                *(f"{n:,}" for n in (seen, self.samples_per_epoch)),
                self.config.data.path,
            )
        self.progress.epoch = self.batches.epoch
        self.progress.samples_at_epoch = self.progress.samples
        log.info("a pass ends: %s", self._describe_progress())

    def _nothing_learned(self) -> DataError:
        return DataError(
            f"of {self.progress.samples:,} samples of {self.config.data.path} none can be used; "
            f"{self.exp_dir / 'skipped.jsonl'} says why, sample by sample"
        )

    def _describe_progress(self) -> str:
        p = self.progress
        return f"step {p.step}, {p.samples:,} samples seen, {p.samples - p.learned:,} of them skipped"

    def save(self) -> None:
        """Keep the run as it stands; complete only when the manifest and then `latest` are written."""
        directory = layout.step_dir(self.exp_dir, self.progress.step)
        if self.topology.rank == 0:
            layout.start(directory, replace=True)
            # Not the source's once there is a save: a source that is an earlier step of this run may be pruned by now.
            layout.copy_processor(layout.latest_step_dir(self.exp_dir) or self.source, directory)
        dist.barrier()
        sharded.save_run(self.model, self._run_state(), directory / layout.STATE)
        dist.barrier()
        if self.topology.rank == 0:
            assert self.loader is not None, "rank 0 reads data"
            progress = asdict(self.progress) | self._layout() | {"data": self.loader.state_dict()}
            layout.write_manifest(
                directory, layout.Manifest(step=self.progress.step, config=to_dict(self.config), progress=progress)
            )
            layout.mark_latest(self.exp_dir, self.progress.step)
            layout.prune(self.exp_dir, self.config.checkpoint.keep)

    def resume(self) -> None:
        """Go on from the run's latest save, if there is one; it may have been made at another layout.

        Raises:
            CheckpointError: the save does not fit this run.
            ConfigError: it stands at a position in other data, or other parts were trained.
        """
        directory = layout.latest_step_dir(self.exp_dir)
        if directory is None:
            return
        manifest = layout.read_manifest(directory)
        trained = manifest.config["train"]["trainable"]
        if set(trained) != set(self.config.train.trainable):
            raise ConfigError(
                f"{directory} was saved by a run that trains {sorted(trained)}, this one trains "
                f"{sorted(self.config.train.trainable)}: the optimizer's state cannot be carried over. Restore "
                f"train.trainable, or start a new exp_dir with checkpoint.init_from={directory}"
            )
        saved = dict(manifest.progress)
        was = {key: saved.pop(key) for key in self._layout()}
        position = saved.pop("data")
        if self.loader is not None:
            self.loader.load_state_dict(position)
        sharded.load_run(self.model, self._run_state(), directory / layout.STATE, same_layout=was == self._layout())
        self.progress = Progress(**saved)
        self.schedule.resume(self.progress.samples if self.config.train.max_steps is None else self.progress.step)
        self.batches.epoch = self.progress.epoch
        log.info("resumed %s at step %d", directory, self.progress.step)

    def _layout(self) -> dict[str, int]:
        """What the random streams belong to."""
        return {"tp_size": self.topology.tp_size, "pp_size": self.topology.pp_size}

    def _run_state(self) -> sharded.RunState:
        return sharded.RunState(optimizer=self.optimizer, scheduler=self.schedule.scheduler)
