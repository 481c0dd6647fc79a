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

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole order: two passes with the same one hold the same rows."""
        return hashlib.sha256(self.samples.tobytes() + self.starts.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One data-parallel rank's part of every step: the rows of micro batch m are dealt to the ranks in turn.

    With 2 ranks and micro batches of 2 rows, a step of 8 rows is dealt 0 0 1 1 0 0 1 1.
    """

    global_batch_size: int = 1
    """Rows a step."""
    micro_batch_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    def rows(self, first: int, end: int) -> list[int]:
        """This rank's rows, in order.

        Args:
            first: the row that the first step begins with.
            end: behind the last row; the last step may be incomplete.
        """
        return [
            row
            for row in range(first, end)
            if (row - first) % self.global_batch_size // self.micro_batch_size % self.dp_size == self.dp_rank
        ]


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


def plan_pass(numbers: Numbers, lengths: NDArray[np.int32], *, seq_length: int, window: int, pack: bool) -> Pass:
    """Group samples into rows, window by window; the emptiest row of a window is filled up in the next.

    Args:
        numbers: [n] samples in order.
        lengths: tokens of every sample, by its number; 0 for one that cannot be used, which rides with any row.
        seq_length: tokens of a row.
        window: samples that are packed together: a sample moves by at most this many places, and once more each time
            that it is carried on.
        pack: false puts one sample into a row.

    Returns:
        Every one of `numbers` in exactly one row.
    """
    rows: list[Numbers] = []
    if not pack:
        rows = [numbers[group] for group in one_per_row(lengths[numbers].tolist())]
    carried = numbers[:0]
    for start in range(0, len(numbers) if pack else 0, window):
        pool = np.concatenate([carried, numbers[start : start + window]])
        sizes = lengths[pool]
        groups = best_fit_decreasing(sizes.tolist(), seq_length)
        carried = numbers[:0]
        if start + window < len(numbers):
            emptiest = min(groups, key=lambda group: sizes[group].sum())
            groups.remove(emptiest)
            carried = pool[emptiest]
        rows += [pool[group] for group in groups]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Pass(samples=np.concatenate([*rows, numbers[:0]]), starts=starts)
