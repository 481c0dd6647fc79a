"""Pure functions of packing: lengths -> groups, documents -> a row, rows -> a micro batch.

A row of s tokens holds whole documents end to end; what is left over is padding, a document of its own. Attention,
labels and positions never cross a document's boundary (`cu_seqlens`).
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence

import torch

from qwen3_vlm.data.sample import EncodedSample, MediaBatch, MicroBatch, PackedRow
from qwen3_vlm.modality.base import Modality


def best_fit_decreasing(
    lengths: Sequence[int], capacity: int, *, items: Sequence[int] | None = None, max_items: int | None = None
) -> list[list[int]]:
    """Group documents into rows: longest first, each into the fullest row that still takes it. O(n log n), without
    max_items.

    Args:
        lengths: tokens of each document, 0..capacity (0: a skipped sample, which rides with any row).
        capacity: tokens of a row.
        items: media items of each document; only looked at with max_items.
        max_items: of a row; a document that has more by itself is alone with documents without any.

    Returns:
        Indices into `lengths`, every one exactly once; groups and their members in order of arrival, so that the order
        of the rows does not follow length.
    """
    groups: list[list[int]] = []
    held: list[int] = []  # media items of each group
    space: list[tuple[int, int]] = []  # (free tokens, group), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        k = bisect.bisect_left(space, (lengths[i], -1))
        if max_items is not None and items is not None and items[i]:
            while k < len(space) and held[space[k][1]] + items[i] > max_items:
                k += 1
        if k == len(space):
            groups.append([])
            held.append(0)
            free, group = capacity, len(groups) - 1
        else:
            free, group = space.pop(k)
        groups[group].append(i)
        held[group] += items[i] if items is not None else 0
        bisect.insort(space, (free - lengths[i], group))
    return sorted(sorted(group) for group in groups)


def one_per_row(lengths: Sequence[int]) -> list[list[int]]:
    """Group without packing: one document a row; skipped samples (length 0) ride with the next document, or the last.

    Returns:
        Indices into `lengths`, every one exactly once, in order of arrival.
    """
    groups: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if length > 0 and any(lengths[j] > 0 for j in groups[-1]):
            groups.append([])
        groups[-1].append(i)
    return [group for group in groups if group]


def pack_row(
    samples: Sequence[EncodedSample], *, seq_length: int, pad_id: int, modalities: Mapping[str, Modality]
) -> PackedRow:
    """Lay documents end to end and pad the row.

    Args:
        samples: documents with their media read, and skipped samples; together at most seq_length tokens.
        seq_length: s, tokens of the row.
        pad_id: fills the rest.
        modalities: every one is present in the row's media.

    Returns:
        The row; labels and loss_mask stand at the position that predicts: for a document a b C D with targets C D,
        labels = 0 C D 0 and loss_mask = 0 1 1 0.
    """
    documents = [sample for sample in samples if sample.skipped is None]
    ends = _cumulative([len(document) for document in documents])
    used = ends[-1]
    assert used <= seq_length, f"{used} tokens packed into a row of {seq_length}"
    if used < seq_length:
        ends.append(seq_length)

    input_ids = torch.full((seq_length,), pad_id, dtype=torch.int64)
    labels = torch.zeros(seq_length, dtype=torch.int64)
    loss_mask = torch.zeros(seq_length, dtype=torch.float32)
    for document, start in zip(documents, ends, strict=False):
        end = start + len(document)
        input_ids[start:end] = document.input_ids
        target = document.is_target[1:]
        labels[start : end - 1] = document.input_ids[1:] * target
        loss_mask[start : end - 1] = target.float()

    return PackedRow(
        input_ids=input_ids,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)]),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        media={name: _join_media(name, modality, documents, ends) for name, modality in modalities.items()},
        keys=[document.key for document in documents],
        skipped=[sample.skipped for sample in samples if sample.skipped is not None],
    )


def empty_row(*, seq_length: int, pad_id: int, modalities: Mapping[str, Modality]) -> PackedRow:
    """A row of padding alone, for a rank that runs out of data before the others do."""
    return pack_row([], seq_length=seq_length, pad_id=pad_id, modalities=modalities)


def collate_rows(rows: Sequence[PackedRow]) -> MicroBatch:
    """Lay rows end to end for one forward pass.

    Args:
        rows: at least one; all of the same length and modalities.

    Returns:
        The micro batch, t = len(rows) * s; positions of media and cu_seqlens count from its start.
    """
    starts = _cumulative([row.input_ids.numel() for row in rows])
    ends = [row.cu_seqlens[1:] + start for row, start in zip(rows, starts, strict=False)]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), *ends])
    return MicroBatch(
        input_ids=torch.cat([row.input_ids for row in rows]),
        labels=torch.cat([row.labels for row in rows]),
        loss_mask=torch.cat([row.loss_mask for row in rows]),
        position_ids=torch.cat([row.position_ids for row in rows]),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        media={
            name: MediaBatch(
                data=rows[0].media[name].data if len(rows) == 1 else torch.cat([row.media[name].data for row in rows]),
                positions=torch.cat(
                    [row.media[name].positions + start for row, start in zip(rows, starts, strict=False)]
                ),
            )
            for name in rows[0].media
        },
        num_samples=sum(len(row.keys) for row in rows),
        num_tokens=sum(int(row.cu_seqlens[len(row.keys)]) for row in rows),
        skipped=[skipped for row in rows for skipped in row.skipped],
        keys=[key for row in rows for key in row.keys],
    )


def _join_media(name: str, modality: Modality, documents: Sequence[EncodedSample], starts: Sequence[int]) -> MediaBatch:
    none = torch.empty((0, *modality.media_shape), dtype=modality.media_dtype)
    shifted = [d.media_positions[name] + start for d, start in zip(documents, starts, strict=False)]
    return MediaBatch(
        data=torch.cat([none, *(document.media[name] for document in documents)]),
        positions=torch.cat([torch.empty(0, dtype=torch.int64), *shifted]),
    )


def _cumulative(lengths: Sequence[int]) -> list[int]:
    """[a, b, c] -> [0, a, a + b, a + b + c]"""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends
