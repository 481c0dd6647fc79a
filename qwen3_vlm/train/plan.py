"""Derived numbers of a run, computed once and printed with their arithmetic before it starts."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_vlm.checkpoint.layout import Architecture
from qwen3_vlm.config.compose import to_dict
from qwen3_vlm.config.schema import RunConfig
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.parallel.topology import Topology


def check_architecture(config: RunConfig, stored: Architecture, source: Path) -> None:
    """Compare the model that the run asks for with the one that its checkpoint holds.

    Raises:
        ConfigError: they differ in more than the name of the size.
    """
    asked = {"model": to_dict(config.model), "modality": to_dict(config.modality)}
    found = {"model": to_dict(stored.model), "modality": to_dict(stored.modality)}
    asked["model"]["name"] = found["model"]["name"]
    different = [f"{key}: {a!r} asked, {b!r} in the checkpoint" for key, a, b in _leaf_pairs(asked, found) if a != b]
    if different:
        raise ConfigError(
            f"{source} holds another model than the run asks for ({len(different)} differences, e.g. {different[0]}). "
            "Use model=from_checkpoint, or the checkpoint of this model."
        )


def _leaf_pairs(asked: Any, found: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(asked, dict) and isinstance(found, dict):
        for key in sorted({*asked, *found}):
            yield from _leaf_pairs(asked.get(key), found.get(key), f"{path}.{key}" if path else key)
    else:
        yield path, asked, found


def total_samples(config: RunConfig, samples: int) -> int:
    """Samples of the whole run, rounded up: train.epochs passes over `samples`."""
    return math.ceil(config.train.epochs * samples)


def describe_run(config: RunConfig, topology: Topology, *, samples: int, rows: int, fill: float) -> list[str]:
    """Lines for the log.

    Args:
        config: the run.
        topology: where it runs.
        samples: of one pass over the training split.
        rows: of the first pass.
        fill: share of their positions that hold tokens.
    """
    t, p = config.train, config.parallel
    accumulation = t.global_batch_size // (t.micro_batch_size * topology.dp_size)
    steps = math.ceil(rows / t.global_batch_size)
    if t.max_steps is not None:
        length = f"{t.max_steps:,} steps (train.max_steps) = {t.max_steps / max(1, steps):.3g} epochs"
    else:
        length = (
            f"{t.epochs:g} epochs = {total_samples(config, samples):,} samples, about {t.epochs * steps:,.0f} steps"
        )
    tokens = f"{t.global_batch_size} x {t.seq_length} = {t.global_batch_size * t.seq_length:,} tokens a step"
    return [
        f"world {topology.world_size} = tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {topology.dp_size}",
        f"global batch {t.global_batch_size} rows = micro batch {t.micro_batch_size} x {accumulation} micro batches x "
        f"dp {topology.dp_size}; {tokens}",
        f"{samples:,} training samples in {rows:,} rows, {fill:.1%} full: {steps:,} steps an epoch; {length}",
    ]
