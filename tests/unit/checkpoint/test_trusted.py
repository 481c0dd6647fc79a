"""A checkpoint cannot run code on whoever reads it: each of its pickles is refused if it names anything but values."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from qwen3_vlm.checkpoint import compare, sharded, trusted
from qwen3_vlm.checkpoint.stream import StateReader
from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.errors import CheckpointError
from qwen3_vlm.parallel.topology import Topology
from tests.unit.model.builders import IMAGE, build_vlm


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.fixture(scope="module")
def good(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a random state beside it, as a run saves them."""
    folder = tmp_path_factory.mktemp("state")
    state: dict[str, Any] = sharded._model_state(build_vlm(topology, ParallelConfig(), {"image": IMAGE}))
    state["random_state"] = ShardedObject("random_state", {"torch": torch.get_rng_state()}, (1,), (0,))
    sharded.save_tensors(state | {"scheduler": {"num_steps": 3}}, folder)
    return folder


@pytest.fixture
def state(good: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    shutil.copytree(good, tmp_path / "state")
    return tmp_path / "state"


def evil_metadata(state: Path, proof: Path) -> None:
    """As it was, with one object more."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    metadata.planner_data = Evil(proof)
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_common(state: Path, proof: Path) -> None:
    torch.save({"scheduler": Evil(proof)}, state / "common.pt")


def evil_object(state: Path, proof: Path) -> None:
    """The random state of a rank."""
    shutil.rmtree(state)
    state.mkdir()
    sharded.save_tensors({"random_state": ShardedObject("random_state", Evil(proof), (1,), (0,))}, state)


EVIL = pytest.mark.parametrize(
    ("tamper", "named"),
    [(evil_metadata, ".metadata"), (evil_common, "common.pt"), (evil_object, "random_state")],
    ids=["metadata", "common", "random state"],
)


@EVIL
def test_the_tampered_files_are_dangerous(state: Path, tmp_path: Path, tamper: Callable[..., None], named: str):
    """Read without care they do run code: the refusals below are no accident of a broken file."""
    proof = tmp_path / "executed"
    tamper(state, proof)
    if named == ".metadata":
        pickle.loads((state / ".metadata").read_bytes())
    elif named == "common.pt":
        torch.load(state / "common.pt", weights_only=False)
    else:
        metadata = trusted.read_metadata(state)
        (stored,) = metadata.storage_data.values()
        with (state / stored.relative_path).open("rb") as file:
            file.seek(stored.offset)
            torch.load(file, weights_only=False)
    assert proof.exists()


@EVIL
def test_a_model_is_not_loaded_from_it(
    topology: Topology, state: Path, tmp_path: Path, tamper: Callable[..., None], named: str
):
    model = build_vlm(topology, ParallelConfig(), {"image": IMAGE})
    sharded.load_model(model, state)  # a good one loads
    proof = tmp_path / "executed"
    tamper(state, proof)
    with pytest.raises(CheckpointError, match=named) as caught:
        sharded.load_model(model, state)
    assert "posix.mkdir" in str(caught.value) and str(state) in str(caught.value)
    assert not proof.exists()


def test_readers_without_megatron_refuse_it_too(state: Path, good: Path, tmp_path: Path):
    evil_metadata(state, tmp_path / "executed")
    for read in (StateReader, lambda folder: compare.tensor_differences(good, folder, 0)):
        with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
            read(state)
    assert not (tmp_path / "executed").exists()


def test_another_backend_is_refused(state: Path):
    """megatron-core would read it by other code."""
    config = json.loads((state / "metadata.json").read_text())
    (state / "metadata.json").write_text(json.dumps(config | {"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="zarr"):
        trusted.check(state)


@pytest.mark.parametrize("name", ["../elsewhere.distcp", "/etc/passwd"])
def test_files_elsewhere_are_refused(state: Path, name: str):
    metadata = pickle.loads((state / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=f"{name}.*outside its folder"):
        trusted.read_metadata(state)


@pytest.mark.parametrize("kind", [BytesStorageMetadata, TensorStorageMetadata])
def test_transformed_entries_are_refused(topology: Topology, state: Path, kind: type):
    """torch undoes a transform before it unpickles: the bytes that a check sees are not those that would run."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if isinstance(metadata.state_dict_metadata[i.fqn], kind))
    stored = metadata.storage_data[index]
    metadata.storage_data[index] = replace(stored, transform_descriptors=["stream.zstd/1"])
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    model = build_vlm(topology, ParallelConfig(), {"image": IMAGE})
    for read in (trusted.check, StateReader, lambda folder: sharded.load_model(model, folder)):
        with pytest.raises(CheckpointError, match=rf"\.metadata is not read: .*stream\.zstd/1.*{stored.relative_path}"):
            read(state)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_missing_file_is_named(state: Path, name: str):
    (state / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        trusted.check(state)


def test_damage_is_an_error_of_the_checkpoint(state: Path):
    (state / ".metadata").write_bytes((state / ".metadata").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"\.metadata is not read"):
        trusted.check(state)


def test_missing_and_short_files_are_named_before_anything_is_read(state: Path):
    file = next(state.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} is not read: it has \d+ bytes, \.metadata expects \d+"):
        StateReader(state)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        StateReader(state)
