"""Tensors from one rank of a group to all of it, whatever their shapes; objects from all ranks to all."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def broadcast_tensors(
    tensors: list[Tensor] | None, *, source: int, group: dist.ProcessGroup, device: torch.device
) -> list[Tensor]:
    """Give every rank of a group the source's tensors.

    Args:
        tensors: any shapes and dtypes; only the source's are looked at, others pass None.
        source: global rank that has them.
        group: must hold the source; every rank of it must call.
        device: where the result lies.

    Returns:
        The tensors on `device`, in order.
    """
    is_source = dist.get_rank() == source
    if is_source and tensors is None:
        raise ValueError(f"rank {source} is the source of a broadcast but passed no tensors")
    if dist.get_world_size(group) == 1:
        return [t.to(device, non_blocking=True) for t in tensors or []]
    header: list[object] = [[(tuple(t.shape), t.dtype) for t in tensors] if tensors is not None else None]
    dist.broadcast_object_list(header, src=source, group=group, device=device)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = header[0]  # type: ignore[assignment]
    received = []
    for n, (shape, dtype) in enumerate(shapes):
        buffer = (
            tensors[n].to(device).contiguous()
            if is_source and tensors is not None
            else torch.empty(shape, dtype=dtype, device=device)
        )
        if buffer.numel():
            dist.broadcast(buffer, src=source, group=group)
        received.append(buffer)
    return received


def gather_objects(mine: Item, group: dist.ProcessGroup) -> list[Item]:
    """Give every rank of a group what each of them has (picklable, small), in the order of the ranks."""
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered
