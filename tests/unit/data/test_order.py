"""The order of a pass: every sample once, rows that fit, caps, buckets, fair shares; by hand and over random sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_vlm.data.order import Share, Sizes, draw_samples, pass_size, plan_pass

PAIRS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), max_size=120)


def sizes_of(pairs: list[tuple[int, int]]) -> Sizes:
    tokens, items = np.array(pairs, np.int32).reshape(-1, 2).T
    return Sizes(tokens=tokens, items=items * (tokens > 0))


@given(PAIRS, st.integers(1, 40), st.booleans(), st.none() | st.integers(1, 20), st.booleans(), st.randoms())
def test_every_sample_is_in_one_row_that_it_fits(pairs, window, pack, max_items, bucket, random):
    sizes = sizes_of(pairs)
    numbers = np.array(random.sample(range(len(pairs)), len(pairs)), np.int64)
    order = plan_pass(
        numbers, sizes, seq_length=50, window=window, pack=pack, max_items=max_items, bucket_by_items=bucket
    )
    rows = [order.row(i) for i in range(len(order))]
    assert sorted(n for row in rows for n in row) == sorted(numbers.tolist())
    assert order.totals(sizes.tokens).tolist() == [sum(sizes.tokens[n] for n in row) for row in rows]
    for row in rows:
        assert sum(sizes.tokens[row]) <= 50
        with_items = [n for n in row if sizes.items[n]]
        if not pack:
            assert sum(sizes.tokens[n] > 0 for n in row) <= 1
        elif max_items is not None:
            assert sum(sizes.items[row]) <= max_items or len(with_items) == 1


def test_a_window_leaves_its_emptiest_row_to_the_next():
    """Capacity 10, windows of 4: 6+4 | 7 is carried, 3 fills it | ..."""
    sizes = sizes_of([(6, 0), (4, 0), (7, 0), (9, 0), (3, 0), (5, 0), (5, 0), (1, 0)])
    order = plan_pass(np.arange(8), sizes, seq_length=10, window=4, pack=True)
    assert [order.row(i) for i in range(len(order))] == [[0, 1], [3], [2, 4], [5, 6], [7]]


def test_rows_of_a_bucket_hold_similar_samples():
    random = np.random.default_rng(0)
    items = random.choice([0, 1, 2, 3, 8], 400).astype(np.int32)
    sizes = Sizes(tokens=(20 + 10 * items).astype(np.int32), items=items)
    order = plan_pass(random.permutation(400), sizes, seq_length=400, window=200, pack=True, bucket_by_items=True)
    kinds = [{int(items[n]).bit_length() for n in order.row(i)} for i in range(len(order))]
    assert sum(len(kind) == 1 for kind in kinds) > len(kinds) / 2
    assert {frozenset(kind) for kind in kinds} >= {frozenset([bits]) for bits in (0, 1, 2, 4)}


@given(PAIRS, st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 7))
def test_shares_are_disjoint_complete_and_even(pairs, dp_size, per_rank, first):
    items = sizes_of(pairs).items
    first = min(first, len(items))
    batch = dp_size * per_rank
    shares = [Share(global_batch_size=batch, dp_rank=r, dp_size=dp_size).rows(first, items) for r in range(dp_size)]
    for step, parts in enumerate(zip(*shares, strict=True)):
        begin = first + step * batch
        expected = list(range(begin, min(begin + batch, len(items))))
        assert sorted(row for part in parts for row in part) == expected
        assert max(map(len, parts)) == -(-len(expected) // dp_size) <= per_rank
        assert all(list(part) == sorted(part) for part in parts)


def test_shares_balance_items():
    """8 ranks of 4 rows, 0 to 99 items each: the busiest rank has 3% more than the mean; dealt in turn, 45%."""
    items = np.random.default_rng(0).integers(0, 100, 32 * 50).astype(np.int32)
    loads = np.array(
        [
            [items[rows].sum() for rows in Share(global_batch_size=32, dp_rank=rank, dp_size=8).rows(0, items)]
            for rank in range(8)
        ]
    )
    assert (loads.max(axis=0) / loads.mean(axis=0)).mean() < 1.05
    in_turn = items.reshape(50, 4, 8).sum(axis=1)
    assert (in_turn.max(axis=1) / in_turn.mean(axis=1)).mean() > 1.3


def test_draws_follow_seed_and_pass():
    def draw(**changes):
        return draw_samples(
            **({"sizes": [30, 20], "repetitions": [1, 1], "seed": 1, "epoch": 0, "shuffle": True} | changes)
        )

    assert sorted(draw()) == list(range(50))
    assert np.array_equal(draw(), draw())
    assert not np.array_equal(draw(), draw(seed=2)) and not np.array_equal(draw(), draw(epoch=1))
    assert draw(shuffle=False).tolist() == list(range(50))


@pytest.mark.parametrize("shuffle", [True, False])
def test_repetitions(shuffle: bool):
    sizes, repetitions = [10, 4, 0, 6], [2.5, 1, 3, 0.5]
    numbers = draw_samples(sizes, repetitions, seed=3, epoch=1, shuffle=shuffle)
    counts = np.bincount(numbers, minlength=20)
    assert len(numbers) == pass_size(sizes, repetitions) == 32
    assert sorted(counts[:10]) == [2] * 5 + [3] * 5
    assert counts[10:14].tolist() == [1] * 4
    assert sorted(counts[14:]) == [0, 0, 0, 1, 1, 1]
    other = np.bincount(draw_samples(sizes, repetitions, seed=3, epoch=2, shuffle=shuffle), minlength=20)
    assert not np.array_equal(counts, other), "a fraction is drawn anew in every pass"
