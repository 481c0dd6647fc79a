"""Safetensors folders, read and written one tensor at a time with plain reads and writes.

safetensors' own functions map a file into memory or take all its tensors at once: either counts as resident memory of
the process. They are used where that does not matter, to check a file's header.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import fsync
from pathlib import Path
from types import TracebackType

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen3_vlm.checkpoint.uncached import UncachedFile
from qwen3_vlm.errors import WeightsError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights, as safetensors names them. Quantised weights are of others."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_SIZE_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where one tensor lies."""

    file: UncachedFile
    start: int
    """First byte, counted from the start of the file."""
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, sharded or single file.

    Raises:
        WeightsError: there are no safetensors, or more than one way to read them; an index names a file that is missing
            or tensors that its files do not hold; a file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stored: dict[str, _Stored] = {}
        index = self._index()
        for name in self._files(index):
            for tensor, stored in _read_header(folder / name).items():
                if tensor in self._stored:
                    raise WeightsError(
                        f"{folder}: {tensor} is in {Path(str(self._stored[tensor].file.name)).name} and in {name}: "
                        f"leave the files of one model, or an {INDEX} that names them"
                    )
                self._stored[tensor] = stored
        if index is not None:
            held = {tensor: Path(str(stored.file.name)).name for tensor, stored in self._stored.items()}
            other = sorted(tensor for tensor, _ in index.items() ^ held.items())
            if other:
                raise WeightsError(
                    f"{folder / INDEX} and the files disagree on {other[0]}: the index says "
                    f"{index.get(other[0], 'nothing')}, it is in {held.get(other[0], 'none of them')}. Fetch both again"
                )

    def _index(self) -> dict[str, str] | None:
        """Tensor -> file, as the folder's index says; None without one."""
        index = self.folder / INDEX
        if not index.is_file():
            return None
        try:
            names = json.loads(index.read_text())["weight_map"]
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise TypeError("its weight_map is no mapping of names to file names")
        except (ValueError, KeyError, TypeError) as e:
            raise WeightsError(f"{index} is no index of safetensors ({e!r}): it needs a weight_map") from e
        return names

    def _files(self, index: dict[str, str] | None) -> list[str]:
        """The files to read: those that transformers reads, and no choice between two ways."""
        beside = sorted(p.name for p in self.folder.glob("*.safetensors"))
        files = beside if index is None else sorted(set(index.values()))
        if index is not None and WEIGHTS in beside and files != [WEIGHTS]:
            raise WeightsError(
                f"{self.folder} holds {WEIGHTS} and {INDEX}, which names other files ({files[:3]}): transformers "
                "reads the first, others the second. Remove the one that is not the model's"
            )
        if index is None and WEIGHTS in beside and len(beside) > 1:
            other = next(name for name in beside if name != WEIGHTS)
            raise WeightsError(
                f"{self.folder} holds {WEIGHTS} and {other} without an {INDEX}: transformers reads the first alone. "
                "Remove what is not the model's, or give the index"
            )
        missing = [name for name in files if Path(name).name != name or not (self.folder / name).is_file()]
        if missing or not files:
            raise WeightsError(
                f"{self.folder}: expected {WEIGHTS}, or {INDEX} with all its files; missing: {missing or 'all'}. "
                "Pickled weights (.bin) are not read: convert them to safetensors first."
            )
        return files

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it.

        Raises:
            WeightsError: it is none of a weight.
        """
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise WeightsError(
                f"{self.folder}: {name} is {stored.dtype}; weights of {', '.join(DTYPES)} are read. Convert it to "
                "one of them, or take the folder of the model before it was quantised."
            )
        return DTYPES[stored.dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of one tensor; all by default.

        Raises:
            WeightsError: the file ends early, or its dtype is none of a weight.
        """
        stored, dtype = self._stored[name], self.dtype(name)
        rows = stored.shape[0] if stop is None else stop
        value = torch.empty((rows - start, *stored.shape[1:]), dtype=dtype)
        row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
        stored.file.seek(stored.start + start * row_bytes)
        view = value.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            count = stored.file.readinto(view[done:])
            if not count:
                raise WeightsError(f"{self.folder}: {stored.file.name} ends within {name}: fetch the file again")
            done += count
        return value


def _read_header(path: Path) -> dict[str, _Stored]:
    """Tensors of one file; the library checks the header against the file."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as e:
        raise WeightsError(f"{path} is no safetensors file or was cut short ({e}): fetch it again") from e
    file = UncachedFile(path)
    size = int.from_bytes(file.read(_HEADER_SIZE_BYTES), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = _HEADER_SIZE_BYTES + size
    return {
        name: _Stored(
            file=file, start=data + entry["data_offsets"][0], dtype=entry["dtype"], shape=tuple(entry["shape"])
        )
        for name, entry in header.items()
    }


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What is known of a tensor before it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes announced tensors in any order into shards and their index, as transformers names them.

    Leaving the `with` block without an error completes the files and flushes them to the disk.

    Args:
        folder: an existing folder.
        specs: every tensor by name, in the order in which they fill the shards.
        max_shard_bytes: largest size of a file's tensors; a single larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int):
        self._folder = folder
        self._specs = specs
        self._left = dict.fromkeys(specs)
        shards = split_torch_state_dict_into_shards(
            {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()},
            max_shard_size=max_shard_bytes,
        )
        self._where: dict[str, tuple[UncachedFile, int]] = {}
        for file, names in shards.filename_to_tensors.items():
            self._start_file(file, names)
        self._index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        self._sharded = shards.is_sharded

    def _start_file(self, name: str, tensors: list[str]) -> None:
        """Write the header; large dtypes first, so that every tensor is aligned."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        starts: dict[str, int] = {}
        for tensor in sorted(tensors, key=lambda t: -self._specs[t].dtype.itemsize):
            spec = self._specs[tensor]
            starts[tensor], end = end, end + spec.num_bytes
            offsets = [starts[tensor], end]
            header[tensor] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _HEADER_SIZE_BYTES)
        file = UncachedFile(self._folder / name, "w")
        file.write(len(text).to_bytes(_HEADER_SIZE_BYTES, "little") + text)
        data = _HEADER_SIZE_BYTES + len(text)
        self._where |= {tensor: (file, data + start) for tensor, start in starts.items()}

    def write(self, name: str, value: Tensor) -> None:
        """Write one tensor of the announced shape and dtype, once."""
        spec = self._specs[name]
        if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
            raise AssertionError(f"{name}: announced {spec}, given {tuple(value.shape)} {value.dtype}")
        del self._left[name]
        file, start = self._where[name]
        file.seek(start)
        file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        files = {file for file, _ in self._where.values()}
        if error is None:
            if self._left:
                raise AssertionError(f"announced and not written: {list(self._left)[:5]}")
            for file in files:
                fsync(file.fileno())
            if self._sharded:
                (self._folder / INDEX).write_text(json.dumps(self._index, indent=2) + "\n")
        for file in files:
            file.close()
