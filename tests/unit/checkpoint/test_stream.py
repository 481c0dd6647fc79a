"""Streamed state folders are megatron-core's: written in blocks, read back whole or in rows."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from qwen3_vlm.checkpoint import sharded
from qwen3_vlm.checkpoint.stream import Chunk, StateReader, write_state
from qwen3_vlm.errors import CheckpointError
from qwen3_vlm.parallel.topology import Topology


def blocks(key: str, value: Tensor, bounds: Sequence[int]) -> list[Chunk]:
    """Rows between the bounds, each read when asked for."""
    return [
        Chunk(
            key=key,
            global_shape=tuple(value.shape),
            offset=(start, *[0] * (value.dim() - 1)),
            shape=(stop - start, *value.shape[1:]),
            dtype=value.dtype,
            read=lambda start=start, stop=stop: value[start:stop],  # type: ignore[misc]
        )
        for start, stop in itertools.pairwise(bounds)
    ]


VALUES = {
    "embedding": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "stack": torch.arange(48).to(torch.bfloat16).reshape(4, 3, 4),
    "norm": torch.arange(6, dtype=torch.float64),
}
BOUNDS = {"embedding": [0, 3, 6, 7], "stack": [0, 1, 2, 3, 4], "norm": [0, 6]}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    chunks = [chunk for key, value in VALUES.items() for chunk in blocks(key, value, BOUNDS[key])]
    seen: list[int] = []
    (tmp_path / "state").mkdir()
    write_state(chunks, tmp_path / "state", seen.append)
    assert sum(seen) == sum(value.nbytes for value in VALUES.values())
    return tmp_path / "state"


def test_megatron_core_reads_it(topology: Topology, state: Path):
    loaded = dist_checkpointing.load_plain_tensors(str(state))
    assert loaded.keys() == VALUES.keys()
    for key, value in VALUES.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value)


def test_rows_across_blocks(state: Path):
    reader = StateReader(state)
    assert reader.names() == set(VALUES)
    for key, value in VALUES.items():
        assert reader.shape(key) == tuple(value.shape) and reader.dtype(key) == value.dtype
        assert torch.equal(reader.read(key), value)
        for start in range(len(value)):
            for stop in range(start + 1, len(value) + 1):
                assert torch.equal(reader.read(key, start, stop), value[start:stop])


def test_it_reads_what_megatron_core_wrote(topology: Topology, tmp_path: Path):
    whole = {key: dist_checkpointing.ShardedTensor.from_rank_offsets(key, value) for key, value in VALUES.items()}
    sharded.save_tensors(whole, tmp_path)
    reader = StateReader(tmp_path)
    assert all(torch.equal(reader.read(key), value) for key, value in VALUES.items())


def test_a_block_that_is_missing_is_no_uninitialised_memory(tmp_path: Path):
    chunks = blocks("embedding", VALUES["embedding"], BOUNDS["embedding"])
    write_state([chunks[0], chunks[2]], tmp_path, lambda _: None)
    reader = StateReader(tmp_path)
    assert torch.equal(reader.read("embedding", 0, 3), VALUES["embedding"][:3])
    with pytest.raises(CheckpointError, match="embedding hold 20 of 35 values"):
        reader.read("embedding")


def test_nothing_is_read_before_its_turn(tmp_path: Path):
    """One block at a time is alive: the next is read when the one before has been written."""
    order: list[str] = []

    def read(n: int) -> Tensor:
        order.append(f"read {n}")
        return torch.full((1, 2), float(n))

    chunks = [
        Chunk(
            key="x",
            global_shape=(3, 2),
            offset=(n, 0),
            shape=(1, 2),
            dtype=torch.float32,
            read=lambda n=n: read(n),  # type: ignore[misc]
        )
        for n in range(3)
    ]
    position: list[int] = []
    write_state(chunks, tmp_path, lambda _: position.append(next(tmp_path.glob("*.distcp")).stat().st_size))
    assert order == ["read 0", "read 1", "read 2"]
    assert position[0] < position[2]  # blocks before the last are in the file when the last is read


def test_it_lacks_what_makes_it_complete_until_the_end(tmp_path: Path):
    class Killed(BaseException):
        pass

    def killed(_: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        write_state(blocks("norm", VALUES["norm"], [0, 6]), tmp_path, killed)
    assert not {".metadata", "metadata.json"} & {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        StateReader(tmp_path)
