"""The world cut into tensor, pipeline and data parallel ranks; the only caller of Megatron's initialisation."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.parallel.backend import Backend, select_backend


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this process stands."""

    backend: Backend
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int

    @property
    def is_first_stage(self) -> bool:
        """This rank holds the embeddings and the encoders."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the output layer and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_model_parallel_source(self) -> bool:
        """This rank loads data for all tensor and pipeline ranks of its data-parallel rank."""
        return self.tp_rank == 0 and self.pp_rank == 0


def world_size_from_env() -> int:
    """Processes in this job, as torchrun announces them (WORLD_SIZE); 1 when started without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(parallel: ParallelConfig, *, seed: int, timeout_s: float = 1800.0) -> Topology:
    """Start torch.distributed and Megatron's groups, and seed every random stream.

    Args:
        parallel: sizes; the world must be divisible by tp * pp (config.validate checks it).
        seed: seed of the model-parallel random streams.
        timeout_s: how long a collective may wait before the job fails.
    """
    backend = select_backend()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            os.environ.setdefault(key, value)
        dist.init_process_group(backend.distributed, timeout=timedelta(seconds=timeout_s))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return Topology(
        backend=backend,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )


def shutdown() -> None:
    """Undo `initialize`, so that a process may start another layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
