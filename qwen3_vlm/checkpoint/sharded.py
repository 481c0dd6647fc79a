"""Distributed save and load: the model at any layout; a run's optimizer, schedule and random state with it.

megatron-core's dist_checkpointing does the work. A name that is missing on either side is an error: nothing is left at
its initial value, and nothing in the checkpoint is passed over, without a word.
"""

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
    model_state = _model_state(model)
    save_tensors(
        {
            **model_state,
            "optimizer": run.optimizer.sharded_state_dict(model.sharded_state_dict(), metadata=OPTIMIZER_SHARDING),
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
    request: dict[str, Any] = {
        "optimizer": run.optimizer.sharded_state_dict(
            model.sharded_state_dict(), is_loading=True, metadata=OPTIMIZER_SHARDING
        )
    }
    if same_layout:
        request["random_state"] = _random_state()
    load_model(model, directory)
    loaded, _ = _load(request, directory)
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _set_random_state(loaded["random_state"])
