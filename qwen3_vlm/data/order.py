"""The order of one pass over the data: which samples make which row, decided before anything is read.

The order follows from the lengths of the samples, the seed and the number of the pass alone. How many data-parallel
ranks and worker processes share the rows out is no part of it: a run can go on with other numbers of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.data.packing import best_fit_decreasing, one_per_row

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows of one pass; n samples, r rows."""

    samples: Numbers
    """[n] sample numbers, row after row."""
    starts: Numbers
    """[r + 1] where each row begins in `samples`; the last entry is n."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    def row(self, index: int) -> list[int]:
        """Sample numbers of one row."""
        return self.samples[self.starts[index] : self.starts[index + 1]].tolist()

    def totals(self, of_samples: NDArray[np.int32]) -> NDArray[np.int32]:
        """[r] sums over the samples of each row; of_samples: [n], by sample number."""
        sums = np.concatenate([[0], np.cumsum(of_samples[self.samples])])
        return np.diff(sums[self.starts]).astype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole order: two passes with the same one hold the same rows."""
        return hashlib.sha256(self.samples.tobytes() + self.starts.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One data-parallel rank's part of every step."""

    global_batch_size: int = 1
    """Rows a step."""
    dp_rank: int = 0
    dp_size: int = 1

    def rows(self, first: int, items: NDArray[np.int32]) -> list[list[int]]:
        """This rank's rows of each step.

        A step's rows are dealt so that every rank has as many rows and about as many media items as the others: those
        with most items first, each to the rank that has the fewest yet (longest processing time first, Graham 1969).
        Who computes a row changes nothing that is learned.

        Args:
            first: the row that the first step begins with.
            items: [r] media items of every row of the pass; the last step may be incomplete.

        Returns:
            A list of row numbers a step, in ascending order.
        """
        return [
            self._deal(np.arange(start, min(start + self.global_batch_size, len(items))), items)
            for start in range(first, len(items), self.global_batch_size)
        ]

    def _deal(self, rows: NDArray[np.int64], items: NDArray[np.int32]) -> list[int]:
        if self.dp_size == 1:
            return rows.tolist()
        most = -(-len(rows) // self.dp_size)
        hands: list[list[int]] = [[] for _ in range(self.dp_size)]
        loads = [0] * self.dp_size
        for row in rows[np.argsort(-items[rows], kind="stable")].tolist():
            rank = min(
                (r for r in range(self.dp_size) if len(hands[r]) < most), key=lambda r: (loads[r], len(hands[r]))
            )
            hands[rank].append(row)
            loads[rank] += int(items[row])
        return sorted(hands[self.dp_rank])


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is known of every sample before anything but its text is read; n samples."""

    tokens: NDArray[np.int32]
    """[n] 0 for a sample that cannot be used."""
    items: NDArray[np.int32]
    """[n] media items of all modalities together."""


def draw_samples(
    sizes: Sequence[int], repetitions: Sequence[float], *, seed: int, epoch: int, shuffle: bool
) -> Numbers:
    """Choose and order the samples of one pass.

    Args:
        sizes: samples of each data set; they are numbered one data set after the other.
        repetitions: how often a data set comes in a pass; of a fraction, samples are drawn anew in every pass.
        seed: with epoch, defines the draw and the order.
        epoch: number of the pass.
        shuffle: false keeps the order of the numbers.

    Returns:
        [n] sample numbers, n = `pass_size(sizes, repetitions)`.
    """
    digest = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    drawn = []
    first = 0
    for size, times in zip(sizes, repetitions, strict=True):
        whole, rest = divmod(pass_size([size], [times]), size) if size else (0, 0)
        drawn += [np.arange(first, first + size)] * whole
        drawn.append(np.sort(first + generator.permutation(size)[:rest]))
        first += size
    numbers = np.concatenate([*drawn, np.empty(0, np.int64)]).astype(np.int64)
    return generator.permutation(numbers) if shuffle else numbers


def pass_size(sizes: Sequence[int], repetitions: Sequence[float]) -> int:
    """Samples of one pass over data sets that come several times, or in part."""
    return sum(int(size * times) for size, times in zip(sizes, repetitions, strict=True))


def plan_pass(
    numbers: Numbers,
    sizes: Sizes,
    *,
    seq_length: int,
    window: int,
    pack: bool,
    max_items: int | None = None,
    bucket_by_items: bool = False,
) -> Pass:
    """Group samples into rows, window by window; the emptiest row of a window is filled up in the next.

    Args:
        numbers: [n] samples in order.
        sizes: of every sample, by its number; one that cannot be used rides with any row.
        seq_length: tokens of a row.
        window: samples that are packed together: a sample moves by at most this many places, and once more each time
            that it is carried on.
        pack: false puts one sample into a row.
        max_items: media items of a row; a sample that has more by itself gets a row without others.
        bucket_by_items: rows hold samples of similar numbers of items (0, 1, 2-3, 4-7, ...), but for what fills gaps.

    Returns:
        Every one of `numbers` in exactly one row.
    """
    if not pack:
        groups = one_per_row(sizes.tokens[numbers].tolist())
        return _as_pass([numbers[group] for group in groups], numbers)

    def fill(pool: Numbers) -> list[list[int]]:
        """Rows of places in the pool, ordered by their first one."""
        tokens, items = sizes.tokens[pool].tolist(), sizes.items[pool]
        # Bits of the number of items: 0, 1, 2-3, 4-7, ... One bucket if they are not told apart.
        buckets = np.frexp(items.astype(np.float64))[1] * bucket_by_items
        items = items.tolist()
        units: list[list[int]] = []
        for bucket in np.unique(buckets)[::-1]:
            # The gaps of rows with more items are filled by samples with fewer: a row is a unit as a sample is.
            units += [[place] for place in np.flatnonzero(buckets == bucket).tolist()]
            groups = best_fit_decreasing(
                [sum(tokens[place] for place in unit) for unit in units],
                seq_length,
                items=[sum(items[place] for place in unit) for unit in units],
                max_items=max_items,
            )
            units = [[place for unit in group for place in units[unit]] for group in groups]
        return sorted(sorted(unit) for unit in units)

    rows: list[Numbers] = []
    carried = numbers[:0]
    for start in range(0, len(numbers), window):
        pool = np.concatenate([carried, numbers[start : start + window]])
        filled = [pool[row] for row in fill(pool)]
        carried = numbers[:0]
        if start + window < len(numbers):
            carried = filled.pop(min(range(len(filled)), key=lambda i: int(sizes.tokens[filled[i]].sum())))
        rows += filled
    return _as_pass(rows, numbers)


def _as_pass(rows: Sequence[Numbers], numbers: Numbers) -> Pass:
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Pass(samples=np.concatenate([*rows, numbers[:0]]), starts=starts)
