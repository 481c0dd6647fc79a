"""Rearrangements and their inverses, for every shape."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_vlm.convert import transforms

SIZES = st.integers(1, 4)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) + start).reshape(shape)


@given(groups=SIZES, queries_per_group=SIZES, head_dim=SIZES, hidden=st.integers(0, 3))
def test_qkv_round_trip(groups: int, queries_per_group: int, head_dim: int, hidden: int):
    """Weights [rows, h] and biases [rows] (hidden = 0)."""
    columns = (hidden,) if hidden else ()
    q = numbered(groups * queries_per_group * head_dim, *columns)
    k = numbered(groups * head_dim, *columns, start=1000)
    v = numbered(groups * head_dim, *columns, start=2000)
    fused = transforms.fuse_qkv(q, k, v, num_groups=groups)
    assert fused.shape == (len(q) + len(k) + len(v), *columns)
    split = transforms.split_qkv(fused, num_groups=groups, head_dim=head_dim)
    assert all(torch.equal(a, b) for a, b in zip(split, (q, k, v), strict=True))


def test_qkv_rows_lie_group_by_group():
    """Two groups of two query heads, one row a head: q q k v, q q k v."""
    fused = transforms.fuse_qkv(
        torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21]), num_groups=2
    )
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@given(rows=SIZES, columns=SIZES)
def test_gate_up_round_trip(rows: int, columns: int):
    gate, up = numbered(rows, columns), numbered(rows, columns, start=1000)
    fused = transforms.fuse_gate_up(gate, up)
    assert torch.equal(fused[:rows], gate)
    split = transforms.split_gate_up(fused)
    assert torch.equal(split[0], gate) and torch.equal(split[1], up)
