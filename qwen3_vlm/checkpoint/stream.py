"""A state folder, written and read one tensor at a time by one process.

The files are those of megatron-core's torch_dist format, through torch's own FileSystemWriter and FileSystemReader, so
that its dist_checkpointing.load takes them at any layout; no process group and nothing of Megatron is needed.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from qwen3_vlm.checkpoint import trusted
from qwen3_vlm.checkpoint.uncached import UncachedFileSystem
from qwen3_vlm.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A block of one tensor of the checkpoint, read when its turn to be written comes."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Of the block in the tensor."""
    shape: tuple[int, ...]
    """Of the block: as many dimensions as the tensor."""
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the block."""
        return math.prod(self.shape) * self.dtype.itemsize

    def write_item(self) -> WriteItem:
        """The block as torch's writer wants it announced."""
        return WriteItem(
            index=MetadataIndex(self.key, self.offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=torch.Size(self.shape)),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.global_shape),
            ),
        )


class _Writer(FileSystemWriter):
    def __init__(self, directory: Path):
        super().__init__(directory)
        self.fs = UncachedFileSystem()

    def storage_meta(self) -> StorageMeta:
        """Without the path of the folder, which says nothing on another machine."""
        return StorageMeta(save_id=self.save_id)


class _LazyPlanner(DefaultSavePlanner):
    """Reads a block when the writer asks for it."""

    def __init__(self, chunks: dict[MetadataIndex, Chunk], on_bytes: Callable[[int], None]):
        super().__init__()
        self._chunks = chunks
        self._on_bytes = on_bytes

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = self._chunks[write_item.index]
        value = chunk.read().contiguous().view(chunk.shape)
        if value.dtype != chunk.dtype:
            raise AssertionError(f"{chunk.key}: announced {chunk.dtype}, read {value.dtype}")
        self._on_bytes(chunk.num_bytes)
        return value


def write_state(chunks: Sequence[Chunk], directory: Path, on_bytes: Callable[[int], None]) -> None:
    """Write a state folder; it is complete when this returns, and lacks `.metadata` and metadata.json before.

    Args:
        chunks: together they cover their tensors.
        directory: an existing empty folder.
        on_bytes: called with the size of each block.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    items = [chunk.write_item() for chunk in chunks]
    planner = _LazyPlanner({item.index: chunk for item, chunk in zip(items, chunks, strict=True)}, on_bytes)
    writer = _Writer(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan([writer.prepare_local_plan(SavePlan(items))])
    plan = writer.prepare_global_plan(plans)[0]
    # torch never checks the CRC32 of what it saved, and computing it takes longer than writing (0.4 against 3.5 GB/s).
    computes_crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        results = writer.write_data(plan, planner).wait()
    finally:
        torch.serialization.set_crc32_options(computes_crc)
    writer.finish(metadata, [results])
    torch.save({}, directory / trusted.COMMON)
    (directory / trusted.CONFIG_FILE).write_text(json.dumps(trusted.CONFIG))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows [start, stop) of one tensor; a scalar is taken whole."""

    name: str
    start: int = 0
    stop: int


class _TargetsPlanner(DefaultLoadPlanner):
    """Hands out places in the target that a read item names by its index."""

    def __init__(self, targets: dict[MetadataIndex, Tensor]):
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self._targets[read_item.dest_index][place]


class StateReader:
    """Tensors of a state folder by name, one at a time, whatever layout wrote them.

    Raises:
        CheckpointError: the folder is incomplete or not to be trusted.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        metadata = trusted.read_metadata(directory)
        self._reader = FileSystemReader(directory)
        self._reader.fs = UncachedFileSystem()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def names(self) -> set[str]:
        """Names of all tensors; objects that are no tensors (random states) are not among them."""
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._stored[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._stored[name].properties.dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of one tensor; all by default.

        Raises:
            CheckpointError: the stored blocks leave a part of them out.
        """
        rows = self.shape(name)[:1]
        if stop is None:
            stop = rows[0] if rows else 1
        return self.read_rows([Rows(name=name, start=start, stop=stop)])[0]

    def read_rows(self, wanted: Sequence[Rows]) -> list[Tensor]:
        """Rows of several tensors in one pass over the files: each file is opened once.

        Raises:
            CheckpointError: the stored blocks leave a part of them out.
        """
        items: list[ReadItem] = []
        targets: dict[MetadataIndex, Tensor] = {}
        results = []
        for rows in wanted:
            stored = self._stored[rows.name]
            sizes = list(stored.size)
            offsets = [0] * len(sizes)
            if sizes:
                offsets[0], sizes[0] = rows.start, rows.stop - rows.start
            chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            blocks = create_read_items_for_chunk_list(rows.name, stored, [chunk])
            found = sum(math.prod(block.lengths) for block in blocks)
            if found != math.prod(sizes):
                raise CheckpointError(
                    f"{self.directory}: the blocks of {rows.name} hold {found} of {math.prod(sizes)} values: the "
                    "checkpoint is damaged, use another one"
                )
            results.append(torch.empty(sizes, dtype=stored.properties.dtype))
            for block in blocks:
                targets[block.dest_index] = results[-1]
            items += blocks
        self._reader.read_data(LoadPlan(items), _TargetsPlanner(targets)).wait()
        return results
