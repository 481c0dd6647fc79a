"""Two runs side by side: the first step whose numbers part, and the tensors that part in the saved steps both have.

Needs neither Megatron nor the runs' layouts: metrics.jsonl is text, and a checkpoint names a tensor the same at every
layout.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen3_vlm.checkpoint import layout
from qwen3_vlm.checkpoint.stream import StateReader
from qwen3_vlm.errors import CheckpointError

TIMES = ("step_time_s", "tokens_per_s", "images_per_s", "tflops_per_gpu", "mfu")
"""Keys of metrics.jsonl that depend on the machine's speed."""


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """The first step, and in it the first key, that differs."""

    step: int
    key: str
    a: Any
    b: Any


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One tensor that differs between two saved steps."""

    name: str
    """Name in the checkpoint; a layer of a stack is `name[layer]`."""
    largest: float
    """Largest absolute difference; infinite if the tensor is missing on one side or has another shape."""
    relative: float
    """|a - b| / |a|, norms over the tensor."""


def read_metrics(exp_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> line of metrics.jsonl.

    Raises:
        CheckpointError: the folder holds no metrics.jsonl.
    """
    file = exp_dir / "metrics.jsonl"
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: give the exp_dir of a run")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line for line in lines}


def differs(a: Any, b: Any, tolerance: float) -> bool:
    """Numbers by relative difference, everything else by equality."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) > tolerance * max(abs(a), abs(b))
    return bool(a != b)


def first_metric_difference(a: Path, b: Path, tolerance: float) -> MetricDifference | None:
    """Walk the steps that both runs have made, in order.

    Args:
        a, b: exp_dirs.
        tolerance: relative difference of floats that still counts as equal; 0 asks for equal bits.

    Raises:
        CheckpointError: a run has no metrics, or the two have no step in common.
    """
    metrics_a, metrics_b = read_metrics(a), read_metrics(b)
    common = sorted(metrics_a.keys() & metrics_b.keys())
    if not common:
        raise CheckpointError(f"{a} and {b} have no step in common")
    for step in common:
        for key, value in metrics_a[step].items():
            other = metrics_b[step].get(key)
            if key not in TIMES and differs(value, other, tolerance):
                return MetricDifference(step=step, key=key, a=value, b=other)
    return None


def common_steps(a: Path, b: Path) -> list[int]:
    """Steps that both runs still keep, in order."""
    kept = [{p.parent.name for p in layout.checkpoints_dir(run).glob(f"step_*/{layout.MANIFEST}")} for run in (a, b)]
    return sorted(int(name.removeprefix("step_")) for name in kept[0] & kept[1])


def tensor_differences(a: Path, b: Path, tolerance: float) -> list[TensorDifference]:
    """Compare all tensors of two state folders, model and optimizer, one at a time.

    Args:
        a, b: CKPT/state folders.
        tolerance: relative difference of a tensor's norm that still counts as equal; 0 asks for equal bits.

    Returns:
        What differs, in the order of names; the layers of a stack one by one.

    Raises:
        CheckpointError: a folder is incomplete, or its pickles could run code.
    """
    readers = StateReader(a), StateReader(b)
    names = [reader.names() for reader in readers]
    found = []
    for name in sorted(names[0] | names[1]):
        if any(name not in held for held in names) or readers[0].shape(name) != readers[1].shape(name):
            found.append(TensorDifference(name=name, largest=float("inf"), relative=float("inf")))
            continue
        found += [d for d in _compare(name, *(r.read(name) for r in readers)) if d.relative > tolerance]
    return found


def _compare(name: str, a: Tensor, b: Tensor) -> Iterator[TensorDifference]:
    """Differences of a tensor, or of every layer if it is a stack."""
    stacked = ".layers." in name and ".layers.0." not in name and not name.partition(".layers.")[2][0].isdigit()
    pairs = [(f"{name}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))] if stacked else [(name, a, b)]
    for label, x, y in pairs:
        delta = (x.double() - y.double()).abs()
        if delta.any():
            norm = float(x.double().norm())
            yield TensorDifference(
                name=label,
                largest=float(delta.max()),
                relative=float(delta.norm()) / norm if norm else float("inf"),
            )
