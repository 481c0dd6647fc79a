"""One step's micro batches, the same on every tensor and pipeline rank of a data-parallel rank.

Only one rank of each model-parallel group reads data. It takes all rows of a step before the step starts, so that
pipeline stages never wait for one another's data inside the schedule, and the number of samples is known before the
update.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.packing import collate_rows, empty_row
from qwen3_vlm.data.sample import MediaBatch, MicroBatch, SkippedSample
from qwen3_vlm.modality.base import Modality
from qwen3_vlm.parallel.broadcast import broadcast_tensors, gather_objects
from qwen3_vlm.parallel.topology import Topology

Item = TypeVar("Item")
_TENSORS = ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens")


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What a global batch holds, over all ranks."""

    rows: int = 0
    samples: int = 0
    skipped: int = 0
    tokens: int = 0
    """Tokens of documents, padding left out."""
    loss_tokens: int = 0
    items: int = 0
    """Media items (images)."""


@dataclass(kw_only=True)
class StepBatch:
    """This rank's micro batches of one step, and the global counts."""

    micro_batches: list[MicroBatch]
    counts: StepCounts
    skipped: list[SkippedSample] = field(default_factory=list)
    """Of all ranks, on rank 0."""
    keys: list[str] = field(default_factory=list)
    """Keys of all ranks' samples, on rank 0 if they are asked for."""


class StepBatches:
    """Iterates over the steps of a run.

    Args:
        loader: rows of this data-parallel rank; None on ranks that do not read.
        modalities: name -> modality, for empty rows and for media that other stages do not need.
        topology: where this process stands.
        seq_length: tokens a row.
        pad_id: token of padding rows.
        micro_batch_size: rows a micro batch.
        global_batch_size: rows a step, over all data-parallel ranks.
        gather_keys: collect the samples' keys on rank 0.
    """

    def __init__(
        self,
        *,
        loader: RowLoader | None,
        modalities: Mapping[str, Modality],
        topology: Topology,
        seq_length: int,
        pad_id: int,
        micro_batch_size: int,
        global_batch_size: int,
        gather_keys: bool,
    ):
        self._loader = loader
        self._modalities = modalities
        self._topology = topology
        self._seq_length = seq_length
        self._pad_id = pad_id
        self._micro_batch_size = micro_batch_size
        self.num_micro_batches = global_batch_size // (micro_batch_size * topology.dp_size)
        self._gather_keys = gather_keys
        self.epoch = 0
        """Passes completed; a resumed run sets it."""

    def next_step(self) -> StepBatch | None:
        """The next global batch, or None where an epoch ends; the following call starts the next epoch.

        The last batch of an epoch is filled up with rows of padding.
        """
        micro_batches = self._read() if self._loader is not None else None
        counts = self._count(micro_batches)
        if counts.rows == 0:
            self.epoch += 1
            return None
        batch = StepBatch(micro_batches=self._share(micro_batches), counts=counts)
        if self._loader is not None and micro_batches is not None:
            if counts.skipped:
                batch.skipped = self._gather([m.skipped for m in micro_batches])
            if self._gather_keys:
                batch.keys = self._gather([m.keys for m in micro_batches])
        return batch

    def _read(self) -> list[MicroBatch]:
        assert self._loader is not None
        rows = self._loader.next_rows() or []
        wanted = self.num_micro_batches * self._micro_batch_size
        self._rows_read = len(rows)
        padding = empty_row(seq_length=self._seq_length, pad_id=self._pad_id, modalities=self._modalities)
        rows = rows + [padding] * (wanted - len(rows))
        size = self._micro_batch_size
        return [collate_rows(rows[n : n + size]) for n in range(0, wanted, size)]

    def _count(self, micro_batches: list[MicroBatch] | None) -> StepCounts:
        numbers = [0] * len(fields(StepCounts))
        if micro_batches is not None:
            numbers = [
                self._rows_read,
                sum(m.num_samples for m in micro_batches),
                sum(len(m.skipped) for m in micro_batches),
                sum(m.num_tokens for m in micro_batches),
                int(sum(m.loss_mask.sum().item() for m in micro_batches)),
                sum(len(b.data) for m in micro_batches for b in m.media.values()),
            ]
        total = torch.tensor(numbers, dtype=torch.int64, device=self._topology.backend.device)
        dist.all_reduce(total)
        return StepCounts(**dict(zip([f.name for f in fields(StepCounts)], total.tolist(), strict=True)))

    def _share(self, micro_batches: list[MicroBatch] | None) -> list[MicroBatch]:
        """Text to every stage; media to the ranks of the first stage, which holds the towers."""
        device = self._topology.backend.device
        flat = None
        if micro_batches is not None:
            flat = [
                t for m in micro_batches for t in (*(getattr(m, name) for name in _TENSORS), torch.tensor(m.max_seqlen))
            ]
        flat = broadcast_tensors(
            flat,
            source=parallel_state.get_model_parallel_src_rank(),
            group=parallel_state.get_model_parallel_group(),
            device=device,
        )
        media = self._share_media(micro_batches) if self._topology.is_first_stage else None
        size = len(_TENSORS) + 1
        shared = []
        for n in range(self.num_micro_batches):
            input_ids, labels, loss_mask, position_ids, cu_seqlens, max_seqlen = flat[n * size : (n + 1) * size]
            shared.append(
                MicroBatch(
                    input_ids=input_ids,
                    labels=labels,
                    loss_mask=loss_mask,
                    position_ids=position_ids,
                    cu_seqlens=cu_seqlens,
                    max_seqlen=int(max_seqlen),
                    media=media[n] if media is not None else {},
                    num_samples=0,
                )
            )
        return shared

    def _share_media(self, micro_batches: list[MicroBatch] | None) -> list[dict[str, MediaBatch]]:
        names = sorted(self._modalities)
        flat = None
        if micro_batches is not None:
            flat = [t for m in micro_batches for name in names for t in (m.media[name].data, m.media[name].positions)]
        flat = broadcast_tensors(
            flat,
            source=parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
            device=self._topology.backend.device,
        )
        pairs = iter(zip(flat[::2], flat[1::2], strict=True))
        return [
            {
                name: MediaBatch(data=data, positions=positions)
                for name, (data, positions) in ((n, next(pairs)) for n in names)
            }
            for _ in range(self.num_micro_batches)
        ]

    def _gather(self, mine: list[list[Item]]) -> list[Item]:
        """One list for each micro batch -> all ranks' items, by micro batch; called by reading ranks only."""
        of_ranks = gather_objects(mine, parallel_state.get_data_parallel_group())
        return [item for micro_batch in zip(*of_ranks, strict=True) for part in micro_batch for item in part]
