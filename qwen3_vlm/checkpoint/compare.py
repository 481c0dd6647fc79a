"""Two runs side by side: the first step whose numbers part, and what parts in the saved steps both have.

Needs neither Megatron nor the runs' layouts: metrics.jsonl is text, and a checkpoint names a tensor the same at every
layout. NaN counts as equal to NaN in the same place, and infinity to itself; either differs from everything else.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.checkpoint import layout, trusted
from qwen3_vlm.checkpoint.stream import Rows, StateReader
from qwen3_vlm.errors import CheckpointError

TIMES = ("step_time_s", "tokens_per_s", "images_per_s", "tflops_per_gpu", "mfu")
"""Keys of metrics.jsonl that depend on the machine's speed."""
ABSENT = "(absent)"
"""Stands for the value of a key that one side lacks."""
GROUP_BYTES = 2**30
"""What is read of one side in one pass over its files."""
VOCABULARY = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
"""Ends of names of tensors with a row for each token; tensor parallelism pads them."""
RANDOM_STATE = "random_state."
_SLICE = 2**24
"""Values that are compared at a time, in FP64."""


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
    """Largest absolute difference; infinite if the tensor is missing on one side or has another shape, or where one
    side alone is not finite."""
    relative: float
    """|a - b| / |a|, norms over the tensor; infinite where `largest` is, or where a is 0."""


@dataclass(frozen=True, kw_only=True)
class ObjectDifference:
    """One value that differs between two saved steps and is no tensor of the model or of its optimizer state."""

    name: str
    """Where it stands: `optimizer.param_groups[0].step`."""
    a: str
    b: str


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
    """Numbers by relative difference, everything else by equality; NaN equals NaN alone, infinity itself alone."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype != b.dtype or not torch.equal(a, b)
    if isinstance(a, float) and isinstance(b, float):
        if not (math.isfinite(a) and math.isfinite(b)):
            return not (a == b or (math.isnan(a) and math.isnan(b)))
        return abs(a - b) > tolerance * max(abs(a), abs(b))
    return type(a) is not type(b) if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a != b)


def first_metric_difference(a: Path, b: Path, tolerance: float) -> MetricDifference | None:
    """Walk the steps that both runs have made, in order.

    Args:
        a, b: exp_dirs.
        tolerance: relative difference of floats that still counts as equal; 0 asks for equal values.

    Raises:
        CheckpointError: a run has no metrics, or the two have no step in common.
    """
    metrics_a, metrics_b = read_metrics(a), read_metrics(b)
    common = sorted(metrics_a.keys() & metrics_b.keys())
    if not common:
        raise CheckpointError(f"{a} and {b} have no step in common")
    for step in common:
        line_a, line_b = metrics_a[step], metrics_b[step]
        for key in (*line_a, *(key for key in line_b if key not in line_a)):
            x, y = line_a.get(key, ABSENT), line_b.get(key, ABSENT)
            if key not in TIMES and differs(x, y, tolerance):
                return MetricDifference(step=step, key=key, a=x, b=y)
    return None


def common_steps(a: Path, b: Path) -> list[int]:
    """Steps that both runs still keep, in order."""
    kept = [{p.parent.name for p in layout.checkpoints_dir(run).glob(f"step_*/{layout.MANIFEST}")} for run in (a, b)]
    return sorted(int(name.removeprefix("step_")) for name in kept[0] & kept[1])


def common_vocab_size(a: Path, b: Path) -> int | None:
    """Tokens of the vocabulary of two checkpoints, as their manifests say; None if they differ.

    Args:
        a, b: CKPTs.
    """
    sizes = {layout.read_manifest(checkpoint).config["model"]["vocab_size"] for checkpoint in (a, b)}
    return sizes.pop() if len(sizes) == 1 else None


def tensor_differences(a: Path, b: Path, tolerance: float, *, vocab_size: int | None = None) -> list[TensorDifference]:
    """Compare all tensors of two state folders, model and optimizer.

    Args:
        a, b: CKPT/state folders.
        tolerance: relative difference of a tensor's norm that still counts as equal; 0 asks for equal values.
        vocab_size: rows of the embedding and the output layer, and of their optimizer state, that stand for tokens:
            what tensor parallelism pads behind them is not compared. None: all rows are.

    Returns:
        What differs, in the order of names; the layers of a stack one by one.

    Raises:
        CheckpointError: a folder is incomplete, or its pickles could run code.
    """
    readers = StateReader(a), StateReader(b)
    names = [reader.names() for reader in readers]
    sums = {name: _Sums(largest=math.inf) for name in names[0] ^ names[1]}
    comparable: list[tuple[Rows, int]] = []
    for name in sorted(names[0] & names[1]):
        shapes = [_without_padding(name, reader.shape(name), vocab_size) for reader in readers]
        if shapes[0] != shapes[1]:
            sums[name] = _Sums(largest=math.inf)
        else:
            comparable += _pieces(name, shapes[0], max(reader.dtype(name).itemsize for reader in readers))
    for group in _groups(comparable):
        for rows, x, y in zip(group, *(reader.read_rows(group) for reader in readers), strict=True):
            stacked = re.search(r"\.layers\.(?!\d)", rows.name)
            parts = enumerate(zip(x, y, strict=True), start=rows.start) if stacked else [(0, (x, y))]
            for layer, (p, q) in parts:
                sums.setdefault(f"{rows.name}[{layer}]" if stacked else rows.name, _Sums()).add(p, q)
    found = [
        TensorDifference(name=label, largest=one.largest, relative=one.relative())
        for label, one in sorted(sums.items(), key=lambda item: item[0].partition("[")[0])
    ]
    return [d for d in found if not d.relative <= tolerance]


@dataclass
class _Sums:
    """What a comparison has gathered of one tensor."""

    largest: float = 0.0
    delta_squared: float = 0.0
    a_squared: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        for x, y in zip(a.reshape(-1).split(_SLICE), b.reshape(-1).split(_SLICE), strict=True):
            x, y = x.double(), y.double()
            same = (x == y) | (x.isnan() & y.isnan())
            delta = torch.where(same, 0.0, (x - y).abs()).nan_to_num_(nan=math.inf, posinf=math.inf)
            if delta.numel():
                self.largest = max(self.largest, float(delta.max()))
            self.delta_squared += float(delta.square().sum())
            self.a_squared += float(x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).square().sum())

    def relative(self) -> float:
        if self.largest == 0 or math.isinf(self.largest):
            return self.largest
        return math.sqrt(self.delta_squared / self.a_squared) if self.a_squared else math.inf


def _without_padding(name: str, shape: tuple[int, ...], vocab_size: int | None) -> tuple[int, ...]:
    if vocab_size is None or not name.endswith(VOCABULARY):
        return shape
    return min(shape[0], vocab_size), *shape[1:]


def _pieces(name: str, shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[Rows, int]]:
    """Rows of a tensor, and their bytes: no more than GROUP_BYTES at a time."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * itemsize
    at_a_time = max(1, GROUP_BYTES // max(1, row_bytes))
    for start in range(0, rows, at_a_time):
        stop = min(start + at_a_time, rows)
        yield Rows(name=name, start=start, stop=stop), (stop - start) * row_bytes


def _groups(pieces: Sequence[tuple[Rows, int]]) -> Iterator[list[Rows]]:
    """Pieces that are read together, in order."""
    group: list[Rows] = []
    size = 0
    for rows, num_bytes in pieces:
        if group and size + num_bytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(rows)
        size += num_bytes
    if group:
        yield group


def object_differences(a: Path, b: Path, tolerance: float) -> list[ObjectDifference]:
    """Compare what two state folders hold besides tensors: param groups with Adam's step, schedule, random streams.

    Random streams belong to a tensor and pipeline size and are compared only if both runs have the same.

    Args:
        a, b: CKPT/state folders.
        tolerance: as in `differs`.

    Raises:
        CheckpointError: a folder is incomplete, or its pickles could run code.
    """
    objects = [trusted.read_objects(directory) for directory in (a, b)]
    layouts = [{n.partition("/")[0] for n in held if n.startswith(RANDOM_STATE)} for held in objects]
    if layouts[0] != layouts[1]:
        objects = [{n: v for n, v in held.items() if not n.startswith(RANDOM_STATE)} for held in objects]
    values = [dict(_leaves("", held)) for held in objects]
    return [
        ObjectDifference(name=name, a=_shown(x), b=_shown(y))
        for name in sorted(values[0].keys() | values[1].keys())
        if differs(x := values[0].get(name, ABSENT), y := values[1].get(name, ABSENT), tolerance)
    ]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of everything in nested dicts, lists and tuples."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple) and value:
        for n, item in enumerate(value):
            yield from _leaves(f"{name}[{n}]", item)
    else:
        yield name, value


def _shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
