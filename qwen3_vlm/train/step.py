"""One optimizer step, read top to bottom."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from qwen3_vlm.data.sample import MicroBatch
from qwen3_vlm.errors import TrainingError
from qwen3_vlm.model.vlm import packed_documents
from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.batches import StepBatch
from qwen3_vlm.train.loss import masked_loss
from qwen3_vlm.train.optimizer import ProgressSchedule


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step yields, the same on all ranks."""

    loss: float | None
    """Summed loss / global count of loss tokens; None if the batch has no loss token (then nothing was updated)."""
    grad_norm: float | None
    lr: float


def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, functools.partial]:
    """Forward of one micro batch, as megatron-core's schedules call it."""
    batch = next(batches)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        media=batch.media,
        packed_seq_params=packed_documents(batch.cu_seqlens, batch.max_seqlen),
        labels=batch.labels,
    )
    return output, functools.partial(masked_loss, loss_mask_t=batch.loss_mask)


def train_step(
    batch: StepBatch,
    *,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    schedule: ProgressSchedule,
    units: int,
    seq_length: int,
    micro_batch_size: int,
    topology: Topology,
) -> StepResult:
    """Forward and backward over all micro batches, reduce, clip, update.

    Args:
        batch: this rank's micro batches.
        model, optimizer, schedule: what is trained.
        units: by how much the schedule moves: samples of the batch, or 1.
        seq_length: tokens of a row.
        micro_batch_size: rows of a micro batch.
        topology: where this process stands.

    Raises:
        TrainingError: the loss is not finite.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()

    # Rows lie end to end, so a micro batch of b rows is one row of b * s tokens to the schedule. Gradients are summed
    # over tokens; finalize_model_grads divides them by the global count of loss tokens, once.
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batch.micro_batches),
        model=[model],
        num_microbatches=len(batch.micro_batches),
        seq_length=seq_length * micro_batch_size,
        micro_batch_size=1,
        forward_only=False,
    )

    # The last stage has the loss; tensor ranks hold copies of it.
    loss_sum = torch.zeros((), dtype=torch.float64, device=topology.backend.device)
    if topology.is_last_stage and topology.tp_rank == 0:
        loss_sum = torch.stack([r["loss_sum"] for r in reports]).sum()
    dist.all_reduce(loss_sum)
    loss_tokens = batch.counts.loss_tokens
    loss = loss_sum.item() / loss_tokens if loss_tokens else None
    if loss is not None and not math.isfinite(loss):
        raise TrainingError(
            f"loss is {loss} over {loss_tokens} loss tokens of {batch.counts.samples} samples: nothing was updated. "
            "Lower optim.lr, or look for broken weights with tools/convert.py verify."
        )

    lr = schedule.before_step(units)
    grad_norm = None
    if loss is not None:
        _, grad_norm, _ = optimizer.step()
    schedule.after_step(units)
    return StepResult(loss=loss, grad_norm=None if grad_norm is None else float(grad_norm), lr=lr)
