"""Typed samples and batches: shape, dtype and meaning of every field.

Flow: a JSONL row -> `ChatSample` (messages, media as bytes on demand) -> `EncodedSample` (token ids, loss targets,
where the placeholders are) -> `PackedRow` (several documents in seq_length tokens) -> `MicroBatch` (rows joined for one
forward pass).
A bad sample is a value, not an exception: it travels as `SkippedSample` with the row it would have been in, so that
counts are exact at any number of workers and after a resume.

Dims: t = tokens of a micro batch (rows * seq_length), s = tokens of a row, n = tokens of a document, d = documents,
i = media items, k = tokens per item.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch


class MediaFile(Protocol):
    """One media file, read when it is needed."""

    def get(self) -> bytes:
        """Read the file.

        Raises:
            BadSample: it is missing, outside its root, or too large.
        """


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str
    """Text; a modality's sentinel ("<image>") stands where an item belongs."""


@dataclass(kw_only=True)
class SkippedSample:
    """One sample that was left out, and why."""

    key: str
    """The sample's key: its id in the prepared data."""
    reason: str
    """Snake_case word that metrics count by."""
    detail: str
    """What was found, what was expected."""


@dataclass(kw_only=True)
class ChatSample:
    """A prepared row as it was read: messages, and its media not yet opened."""

    key: str
    messages: list[Message]
    media_files: dict[str, list[MediaFile]]
    """Per modality, in the order of the row; modalities without items may be absent."""
    skipped: SkippedSample | None = None
    """Set if the row cannot be used; messages and media_files are then empty."""
    __restore_key__: tuple = ()
    """energon's own bookkeeping: how to read this sample again after a restore."""


@dataclass(kw_only=True)
class EncodedSample:
    """One document: token ids, which of them are predicted, and where its media stand."""

    key: str
    input_ids: torch.Tensor
    """[n] int64"""
    is_target: torch.Tensor
    """[n] bool: the token is an assistant's and counts in the loss."""
    media_positions: dict[str, torch.Tensor]
    """Per configured modality [i * k] int64: index in 0..n-1 of every placeholder position, item by item."""
    media_files: dict[str, list[MediaFile]]
    media: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per configured modality [i, *media_shape]; filled after packing, when the files are read."""
    skipped: SkippedSample | None = None
    """Set if the sample cannot be used; it then has no tokens, and travels only to be counted."""
    __restore_key__: tuple = ()

    def __len__(self) -> int:
        return self.input_ids.numel()


@dataclass(kw_only=True)
class MediaBatch:
    """All items of one modality in a micro batch (or row), in the order of their placeholders."""

    data: torch.Tensor
    """[i, *media_shape] in the modality's media_dtype."""
    positions: torch.Tensor
    """[i * k] int64: flat index in 0..t-1 of every placeholder position, item by item."""


@dataclass(kw_only=True)
class PackedRow:
    """Several documents in a row of seq_length tokens; field meanings as in `MicroBatch`, indices within the row."""

    input_ids: torch.Tensor
    """[s] int64"""
    labels: torch.Tensor
    """[s] int64"""
    loss_mask: torch.Tensor
    """[s] float32"""
    position_ids: torch.Tensor
    """[s] int64"""
    cu_seqlens: torch.Tensor
    """[d + 1] int32"""
    media: dict[str, MediaBatch]
    keys: list[str]
    """Keys of the documents, padding excluded; may be empty."""
    skipped: list[SkippedSample]
    """Samples that were to be in this row and cannot be used."""


@dataclass(kw_only=True)
class MicroBatch:
    """Input of one forward pass: rows of seq_length tokens, laid end to end."""

    input_ids: torch.Tensor
    """[t] int64"""
    labels: torch.Tensor
    """[t] int64: the next token of the same document; 0 where loss_mask is 0."""
    loss_mask: torch.Tensor
    """[t] float32: 1 where the position predicts an assistant token."""
    position_ids: torch.Tensor
    """[t] int64, restarting at 0 in each document."""
    cu_seqlens: torch.Tensor
    """[d + 1] int32: document boundaries from 0 to t; a row's padding is a document of its own."""
    max_seqlen: int
    """Longest document in tokens."""
    media: dict[str, MediaBatch]
    """Per modality; every configured modality is present, with i = 0 where the batch has none."""
    num_samples: int
    """Samples (documents without padding) in the batch."""
    num_tokens: int = 0
    """Tokens of the samples, padding left out."""
    skipped: list[SkippedSample] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Keys of the samples, in order of their documents."""
