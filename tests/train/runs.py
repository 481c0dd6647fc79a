"""Training runs as a user starts them: data folders, command lines, and what a run leaves behind."""

import functools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon import CrudeJsonlDatasetFactory
from megatron.energon.epathlib import EPath

from qwen3_vlm.data.prepare import prepare_llava
from tests.distributed.launch import Finished, launch, run_group
from tests.images import jpeg

TIMES = ("step_time_s", "tokens_per_s", "images_per_s")
"""Keys of metrics.jsonl that no two runs share."""
LR = 0.003
EVERYTHING = "train.trainable=[decoder,image.encoder,image.resampler,image.projector]"
TWO_EPOCHS = ("train.epochs=2", f"optim.lr={LR}")
"""Length of the runs that are compared with each other."""
Row = dict[str, Any]


def row(number: int, *, images: int = 1) -> Row:
    """A LLaVA row; length and content depend on its number."""
    question = "<image> " * images + "What is it?" if images else "What is red?"
    answer = f"No. {number}" + " and so" * (number % 4)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"s{number}", "image": [f"s{number}_{n}.jpg" for n in range(images)], "conversations": turns}


def prepared(folder: Path, rows: Sequence[Row], *, extra_lines: Sequence[str] = ()) -> Path:
    """Write rows and their JPEGs and prepare them; extra lines go into the prepared file, past preparation's checks."""
    images = folder / "images"
    images.mkdir(parents=True)
    for seed, name in enumerate(name for r in rows for name in r["image"]):
        (images / name).write_bytes(jpeg(seed))
    (folder / "rows.json").write_text(json.dumps(rows))
    out = folder / "prepared"
    report = prepare_llava(folder / "rows.json", images, out)
    assert report.train == len(rows)
    if extra_lines:
        with (out / "train.jsonl").open("a") as file:
            file.writelines(line + "\n" for line in extra_lines)
        (out / "train.jsonl.idx").unlink()
        CrudeJsonlDatasetFactory.prepare_dataset(EPath(out / "train.jsonl"))
        fields = json.loads((out / "report.json").read_text())
        (out / "report.json").write_text(json.dumps(fields | {"train": len(rows) + len(extra_lines)}))
    return out


@dataclass(frozen=True)
class Run:
    """What a run left in its exp_dir."""

    exp_dir: Path

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.exp_dir / name).read_text().splitlines()]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl without times."""
        return [{k: v for k, v in line.items() if k not in TIMES} for line in self._lines("metrics.jsonl")]

    @property
    def keys(self) -> list[dict[str, Any]]:
        """sample_keys.jsonl."""
        return self._lines("sample_keys.jsonl")

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """skipped.jsonl."""
        return self._lines("skipped.jsonl")

    def step_dir(self, step: int) -> Path:
        """A saved step."""
        return self.exp_dir / "checkpoints" / f"step_{step:08d}"


def copy_up_to(whole: Run, cut: Run, *, step: int) -> None:
    """Make a run that was killed behind its save of a step."""
    shutil.copytree(whole.step_dir(step), cut.step_dir(step))
    (cut.exp_dir / "checkpoints" / "latest").write_text(f"{cut.step_dir(step).name}\n")
    for file in ("metrics.jsonl", "sample_keys.jsonl"):
        lines = (whole.exp_dir / file).read_text().splitlines(keepends=True)
        (cut.exp_dir / file).write_text("".join(lines[:step]))


def overrides(checkpoint: Path, data: Path, exp_dir: Path, *more: str) -> list[str]:
    """What every tiny FP32 run of these tests has in common."""
    return [
        "model=from_checkpoint",
        f"checkpoint.init_from={checkpoint}",
        f"data.path={data}",
        f"exp_dir={exp_dir}",
        "precision=fp32",
        "data.num_workers=0",
        "data.packing_buffer_size=6",
        "train.seq_length=128",
        "train.global_batch_size=2",
        "checkpoint.save_every=2",
        "checkpoint.keep=9",
        "logging=quiet",
        "logging.sample_keys=true",
        *more,
    ]


def train(
    arguments: Sequence[str], *, num_processes: int = 1, die_at: str | None = None, timeout_s: float = 240
) -> Finished:
    """`python -m qwen3_vlm.train --config-name stage1_align ...`, under torchrun with several processes.

    Args:
        arguments: overrides.
        num_processes: world size.
        die_at: a moment of tests.train.mortal at which the process kills itself.
        timeout_s: the run and its workers are killed after it.
    """
    module = ["-m", "qwen3_vlm.train"] if die_at is None else ["-m", "tests.train.mortal", die_at]
    start = [sys.executable]
    if num_processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    done = run_group([*start, *module, "--config-name", "stage1_align", *arguments], timeout_s=timeout_s)
    assert not done.timed_out, done.describe()
    return done


def train_forked(arguments: Sequence[str], *, num_processes: int, folder: Path, timeout_s: float = 120) -> None:
    """What `train` does, in ranks that are forked and not started: the command without its imports and its parser.

    Args:
        arguments: overrides.
        num_processes: world size.
        folder: for the ranks' output.
        timeout_s: the ranks are killed after it.
    """
    check = functools.partial(_train, arguments=tuple(arguments))
    launch([check], num_processes=num_processes, folder=folder, timeout_s=timeout_s).require(check)


def _train(folder: Path, arguments: Sequence[str]) -> None:
    from qwen3_vlm.checkpoint.layout import read_architecture
    from qwen3_vlm.config.compose import compose
    from qwen3_vlm.config.validate import validate
    from qwen3_vlm.train.__main__ import train as train_in_process

    config = compose("stage1_align", arguments, read_architecture=read_architecture)
    validate(config, int(os.environ["WORLD_SIZE"]))
    train_in_process(config)
