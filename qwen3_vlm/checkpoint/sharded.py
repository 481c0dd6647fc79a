"""Distributed save and load: the model at any layout; a run's optimizer, schedule and random state with it.

megatron-core's dist_checkpointing does the work. A name that is missing on either side is an error: nothing is left at
its initial value, and nothing in the checkpoint is passed over, without a word.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from qwen3_vlm.checkpoint import trusted
from qwen3_vlm.errors import CheckpointError
from qwen3_vlm.model.vlm import VLM

OPTIMIZER_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
"""Optimizer state is stored per parameter, so that it loads at another tp, pp and dp size."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run keeps besides the model."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def _model_state(model: VLM) -> dict[str, Any]:
    """Sharded tensors of the model. TransformerEngine's `_extra_state` (FP8 scales) is left out: checkpoints are free
    of it, so that they load with other layers and precisions."""
    return {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}


def _random_state() -> ShardedObject:
    """This rank's random streams, kept by tensor and pipeline rank; data-parallel ranks share them."""
    state = {
        "torch": torch.get_rng_state(),
        "model_parallel": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pp_rank, pp_size = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    tp_rank, tp_size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return ShardedObject(
        f"random_state.pp{pp_size}.tp{tp_size}",
        state,
        (pp_size, tp_size),
        (pp_rank, tp_rank),
        replica_id=parallel_state.get_data_parallel_rank(),
    )


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["model_parallel"])


@contextlib.contextmanager
def _joined_offsets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let a parameter's offsets count in its gradient buffer's buckets joined without the padding behind each.

    megatron-core 0.16.1 gathers optimizer state in that form (DistributedOptimizer.get_parameter_state_dp_zero) and
    then cuts parameters out of it at the buffer's own offsets, which count the padding
    (sharded_param_state_fully_reshardable): all that lies behind a padded bucket would be saved shifted. Buffers have
    several buckets where two pipeline stages share a trainable tied embedding, and where communication overlaps.
    """
    buffers = [buffer for chunk in optimizer.model_chunks for buffer in chunk.buffers]
    own = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding_before = 0
        shifts = []
        for bucket in buffer.buckets:
            shifts.append(padding_before)
            padding_before += bucket.grad_data.numel() - bucket.numel_unpadded
        buffer.param_index_map = {
            param: (start - shifts[bucket_id], end - shifts[bucket_id], bucket_id)
            for param, (start, end, bucket_id) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, offsets in zip(buffers, own, strict=True):
            buffer.param_index_map = offsets


def _optimizer_state(model: VLM, optimizer: MegatronOptimizer, *, is_loading: bool = False) -> dict[str, Any]:
    """The optimizer's sharded state: each parameter's moments and master weights, whole, under the parameter's name."""
    with _joined_offsets(optimizer):
        return optimizer.sharded_state_dict(
            model.sharded_state_dict(), is_loading=is_loading, metadata=OPTIMIZER_SHARDING
        )


def save_tensors(state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state dict; every rank calls it."""
    dist_checkpointing.save(state, str(directory))


def save_run(model: VLM, run: RunState, directory: Path) -> None:
    """Write model, optimizer, schedule and random state; every rank calls it.

    Args:
        model: this rank's stage.
        run: what goes with it.
        directory: an existing empty folder, seen by all ranks.
    """
    for chunk in run.optimizer.model_chunks:
        # With overlap the last update's weights are gathered by the next forward pass, which has not come yet.
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    model_state = _model_state(model)
    save_tensors(
        {
            **model_state,
            "optimizer": _optimizer_state(model, run.optimizer),
            "scheduler": run.scheduler.state_dict(),
            "random_state": _random_state(),
        },
        directory,
    )


def _load(state: dict[str, Any], directory: Path) -> tuple[dict[str, Any], set[str]]:
    """Load what `state` names; returns it, and the names that the checkpoint holds beyond it.

    Raises:
        CheckpointError: the checkpoint lacks a name that is asked for, or its pickles could run code.
    """
    trusted.check(directory)
    # megatron-core's words are seen from the checkpoint: "missing" from the request, "unexpected" in it.
    loaded, not_requested, absent = dist_checkpointing.load(state, str(directory), strict=StrictHandling.RETURN_ALL)
    if absent:
        raise CheckpointError(
            f"{directory} lacks {len(absent)} tensors that the run needs, e.g. {sorted(absent)[:3]}: it holds another "
            "architecture, or other parts were trained. Use model=from_checkpoint, or the checkpoint of this run."
        )
    return loaded, not_requested


def load_model(model: VLM, directory: Path) -> None:
    """Fill the model from a checkpoint's state folder, whatever layout wrote it.

    Raises:
        CheckpointError: a model tensor is missing in the checkpoint, or the checkpoint holds one that no stage of the
            model has.
    """
    loaded, not_requested = _load(_model_state(model), directory)
    strange = [name for name in not_requested if name.startswith(("language_model.", "towers."))]
    if strange:
        raise CheckpointError(
            f"{directory} holds {len(strange)} model tensors that this model has no place for, e.g. "
            f"{sorted(strange)[:3]}. Use model=from_checkpoint."
        )
    model.load_state_dict({k: v for k, v in loaded.items() if k in model.state_dict()}, strict=False)


def load_run(model: VLM, run: RunState, directory: Path, *, same_layout: bool) -> None:
    """Fill model, optimizer and schedule, and the random streams if the layout is that of the save.

    Args:
        model: this rank's stage.
        run: what is filled with it.
        directory: a saved step's state folder.
        same_layout: tensor and pipeline sizes are those of the save; else random streams start from the seed.

    Raises:
        CheckpointError: something is missing in the checkpoint.
    """
    request: dict[str, Any] = {"optimizer": _optimizer_state(model, run.optimizer, is_loading=True)}
    if same_layout:
        request["random_state"] = _random_state()
    load_model(model, directory)
    loaded, _ = _load(request, directory)
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _set_random_state(loaded["random_state"])
