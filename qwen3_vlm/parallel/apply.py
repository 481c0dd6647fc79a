"""Build a stage, freeze what does not train, wrap it for data parallelism: one ordered function."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_vlm.config.schema import PrecisionConfig
from qwen3_vlm.logging import get_logger
from qwen3_vlm.parallel.backend import select_backend

log = get_logger(__name__)


class Partitioned(Protocol):
    """A model that names its parts."""

    config: TransformerConfig

    def parts(self) -> dict[str, torch.nn.Module]:
        """Name -> module, of this stage."""


Model = TypeVar("Model", bound=torch.nn.Module)


def freeze_all_but(model: Partitioned, trainable: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Let only the named parts take gradients.

    Returns:
        Part -> (trainable, frozen) parameters on this rank.
    """
    counts = {}
    for name, part in model.parts().items():
        trains = name in trainable
        part.requires_grad_(trains)
        size = sum(p.numel() for p in part.parameters())
        counts[name] = (size, 0) if trains else (0, size)
    return counts


def build_stage(
    build: Callable[[], Model],
    load: Callable[[Model], None],
    *,
    trainable: Sequence[str],
    precision: PrecisionConfig,
    device: torch.device,
    overlap: bool | None = None,
) -> tuple[Model, DistributedDataParallel]:
    """One pipeline stage, ready for the schedule.

    Order: build, move to the device, load weights (before the wrapper, which maps trainable weights into its own
    buffers), freeze, wrap. Frozen weights get neither gradient buffers nor optimizer state.

    Args:
        build: makes this rank's stage.
        load: fills it from a checkpoint.
        trainable: parts that learn.
        precision: whether gradients are summed in FP32.
        device: where it runs.
        overlap: reduce gradients during the backward pass and gather weights during the next forward pass; None: as
            the backend does.

    Returns:
        The stage, and the wrapper that the schedule drives.
    """
    model = build().to(device)
    load(model)
    counts = freeze_all_but(model, trainable)  # type: ignore[arg-type]
    for name, (trains, frozen) in counts.items():
        log.info("part %-18s %12s trainable %14s frozen parameters on this rank", name, f"{trains:,}", f"{frozen:,}")
    if overlap is None:
        overlap = select_backend().overlaps_communication
    config: TransformerConfig = model.config
    wrapped = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=precision.grad_reduce_in_fp32,
            check_for_nan_in_grad=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        ),
        module=model,
    )
    # The schedules enter no_sync for all micro batches but the last: only then is a bucket's gradient complete.
    config.no_sync_func = wrapped.no_sync if overlap else None
    config.finalize_model_grads_func = finalize_model_grads
    model.train()
    return model, wrapped
