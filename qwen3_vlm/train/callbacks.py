"""Everything that watches a run without being the step: metrics.jsonl, skipped.jsonl, TensorBoard, the progress bar.

All of it runs on rank 0. A resumed run first drops the lines of steps that it is going to repeat.
"""

import json
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from qwen3_vlm.train.batches import StepBatch
from qwen3_vlm.train.metrics import StepMetrics


class Callback:
    """Named moments of a run."""

    def on_start(self, step: int) -> None:
        """Before the first step; `step` steps are done already."""

    def on_step(self, metrics: StepMetrics, batch: StepBatch, progress: float) -> None:
        """After a step; progress is the share of the run that is done, in 0..1."""

    def on_end(self) -> None:
        """After the last step, or when the run fails."""


def _open_at_step(path: Path, step: int) -> TextIO:
    """Open a file of {"step": n, ...} lines for appending, without the lines behind `step`.

    A half line that a killed run left is dropped with them.
    """
    kept = []
    if path.is_file():
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
    return path.open("a")


class _JsonLines(Callback):
    """A file of one JSON object a line, flushed each step."""

    file_name: str

    def __init__(self, exp_dir: Path):
        self._path = exp_dir / self.file_name
        self._file: TextIO | None = None

    def on_start(self, step: int) -> None:
        """Open the file at this step."""
        self._file = _open_at_step(self._path, step)

    def write(self, line: str) -> None:
        """Write one line."""
        assert self._file is not None
        self._file.write(line + "\n")
        self._file.flush()

    def on_end(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class MetricsFile(_JsonLines):
    """<exp_dir>/metrics.jsonl: nothing but step lines."""

    file_name = "metrics.jsonl"

    def on_step(self, metrics: StepMetrics, batch: StepBatch, progress: float) -> None:
        """Write the step's line."""
        self.write(metrics.to_json())


class SkippedFile(_JsonLines):
    """<exp_dir>/skipped.jsonl: every sample that was left out, by name, with its reason."""

    file_name = "skipped.jsonl"

    def on_step(self, metrics: StepMetrics, batch: StepBatch, progress: float) -> None:
        """Write a line for each skipped sample."""
        for s in batch.skipped:
            self.write(json.dumps({"step": metrics.step, "key": s.key, "reason": s.reason, "detail": s.detail}))


class SampleKeysFile(_JsonLines):
    """<exp_dir>/sample_keys.jsonl: which samples each step learned from (logging.sample_keys)."""

    file_name = "sample_keys.jsonl"

    def on_step(self, metrics: StepMetrics, batch: StepBatch, progress: float) -> None:
        """Write the step's keys."""
        self.write(json.dumps({"step": metrics.step, "keys": batch.keys}))


class TensorBoard(Callback):
    """<exp_dir>/tensorboard."""

    def __init__(self, exp_dir: Path):
        self._directory = exp_dir / "tensorboard"
        self._writer: Any = None

    def on_start(self, step: int) -> None:
        """Start a writer that hides what an interrupted run wrote behind this step."""
        self._writer = SummaryWriter(str(self._directory), purge_step=step + 1)

    def on_step(self, metrics: StepMetrics, batch: StepBatch, progress: float) -> None:
        """Write all numbers of the step."""
        for name in ("loss", "grad_norm", "lr", "tokens_per_s", "images_per_s", "samples", "loss_tokens"):
            value = getattr(metrics, name)
            if value is not None:
                self._writer.add_scalar(name, value, metrics.step)
        self._writer.add_scalar("skipped", sum(metrics.skipped.values()), metrics.step)

    def on_end(self) -> None:
        """Close the writer."""
        if self._writer is not None:
            self._writer.close()


class ProgressBar(Callback):
    """One line on the terminal: progress, loss, rate."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._done = 0.0

    def on_start(self, step: int) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=100.0, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", mininterval=1.0
        )

    def on_step(self, metrics: StepMetrics, batch: StepBatch, progress: float) -> None:
        """Advance it."""
        loss = "-" if metrics.loss is None else f"{metrics.loss:.4f}"
        self._bar.set_postfix_str(
            f"step {metrics.step} loss {loss} lr {metrics.lr:.2e} {metrics.tokens_per_s:,.0f} tok/s", refresh=False
        )
        self._bar.update(min(100.0, 100.0 * progress) - self._done)
        self._done = min(100.0, 100.0 * progress)

    def on_end(self) -> None:
        """Leave it as it stands."""
        if self._bar is not None:
            self._bar.close()
