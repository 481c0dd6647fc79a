"""Our plain reads and writes of safetensors against the library's own."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vlm.convert.safetensors_files import INDEX, SafetensorsFolder, SafetensorsWriter, TensorSpec
from qwen3_vlm.errors import WeightsError

TENSORS = {
    "a.weight": torch.arange(15, dtype=torch.bfloat16).reshape(5, 3),
    "b.scale": torch.tensor(2.5),
    "c.weight": torch.arange(12, dtype=torch.float32).reshape(2, 3, 2),
    "d.weight": torch.arange(4, dtype=torch.float32),
    "e.bias": torch.arange(1, 4, dtype=torch.float16),
}


def write(folder: Path, max_shard_bytes: int) -> None:
    specs = {name: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for name, t in TENSORS.items()}
    with SafetensorsWriter(folder, specs, max_shard_bytes) as writer:
        for name in reversed(TENSORS):  # any order
            writer.write(name, TENSORS[name])


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**6, 1), (60, 3), (1, 5)])
def test_the_library_reads_what_is_written(tmp_path: Path, max_shard_bytes: int, num_files: int):
    write(tmp_path, max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    read = {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    for name, (_, tensor) in read.items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name]), name
    if num_files == 1:
        assert files[0].name == "model.safetensors" and not (tmp_path / INDEX).exists()
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in read.items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


@pytest.mark.parametrize("max_shard_bytes", [10**6, 60])
def test_it_reads_what_it_writes(tmp_path: Path, max_shard_bytes: int):
    write(tmp_path, max_shard_bytes)
    folder = SafetensorsFolder(tmp_path)
    assert folder.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert folder.shape(name) == tuple(tensor.shape) and folder.dtype(name) == tensor.dtype
        if tensor.dim():
            assert torch.equal(folder.read(name), tensor)
            assert torch.equal(folder.read(name, 1, 2), tensor[1:2])


def test_it_reads_what_the_library_writes(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in TENSORS.items() if tensor.dim())


def test_a_tensor_that_was_announced_must_be_written(tmp_path: Path):
    spec = TensorSpec(shape=(2,), dtype=torch.float32)
    with pytest.raises(AssertionError, match=r"not written.*'y'"), SafetensorsWriter(tmp_path, {"y": spec}, 100):
        pass


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path):
    write(tmp_path, 10**6)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(WeightsError, match=r"model\.safetensors .*cut short"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path):
    for name in ("model-1", "model-2"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"model-1\.safetensors and in model-2\.safetensors"):
        SafetensorsFolder(tmp_path)


def write_index(folder: Path, file: str, names: Iterable[str] = TENSORS) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize("second", ["index", "file"])
def test_two_ways_to_read_the_weights_are_refused(tmp_path: Path, second: str):
    """transformers takes model.safetensors; the other holds other values under the same or other names."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in TENSORS.items()} if second == "index" else {"f": torch.zeros(2)}
    save_file(other, tmp_path / "other.safetensors")
    if second == "index":
        write_index(tmp_path, "other.safetensors")
    named = INDEX if second == "index" else "other.safetensors"
    with pytest.raises(WeightsError, match=rf"holds model\.safetensors and {named}"):
        SafetensorsFolder(tmp_path)


def test_an_index_of_the_one_file_is_no_second_way(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    write_index(tmp_path, "model.safetensors")
    assert SafetensorsFolder(tmp_path).names() == set(TENSORS)


@pytest.mark.parametrize("names", [[*TENSORS, "zz"], list(TENSORS)[:-1]], ids=["too many", "too few"])
def test_an_index_that_its_files_do_not_bear_out_is_refused(tmp_path: Path, names: list[str]):
    save_file(TENSORS, tmp_path / "part.safetensors")
    write_index(tmp_path, "part.safetensors", names)
    with pytest.raises(WeightsError, match=f"disagree on {'zz' if 'zz' in names else list(TENSORS)[-1]}"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', b"\xff"])
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: str | bytes):
    (tmp_path / INDEX).write_bytes(index if isinstance(index, bytes) else index.encode())
    with pytest.raises(WeightsError, match=INDEX):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(("dtype", "named"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")])
def test_dtypes_that_are_none_of_a_weight_are_refused(tmp_path: Path, dtype: torch.dtype, named: str):
    save_file({"w": torch.zeros(2, dtype=dtype)}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(WeightsError, match=f"w is {named}"):
        folder.read("w")
