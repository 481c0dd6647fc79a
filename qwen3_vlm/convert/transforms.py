"""Rearrangements between Hugging Face's tensors and megatron-core's; every one with its inverse."""

import torch
from torch import Tensor


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, *, num_groups: int) -> Tensor:
    """Separate projections -> megatron-core's fused one.

    Rows are ordered group by group: the group's query heads, its key head, its value head
    (megatron-core 0.16.1, transformer/attention.py, SelfAttention.get_query_key_value_tensors).

    Args:
        q: [n * d, h] (or [n * d] for a bias).
        k, v: [g * d, h] (or [g * d]).
        num_groups: g.

    Returns:
        [(n + 2 g) * d, h] (or 1-D).
    """
    parts = [x.unflatten(0, (num_groups, -1)) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, *, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `fuse_qkv`: [(n + 2 g) * d, ...] -> q [n * d, ...], k and v [g * d, ...]."""
    grouped = qkv.unflatten(0, (num_groups, -1))
    queries = grouped.shape[1] - 2 * head_dim
    q, k, v = grouped.split([queries, head_dim, head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def fuse_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's two projections -> one, gate first: 2 x [f, h] -> [2 f, h]."""
    return torch.cat([gate, up])


def split_gate_up(fused: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `fuse_gate_up`."""
    gate, up = fused.chunk(2)
    return gate, up
