"""Reading a checkpoint runs no code from it.

A torch_dist folder holds pickles in three places: `.metadata`, `common.pt` and the byte entries of the .distcp files.
torch and megatron-core read the first and the last without restriction. What stands here reads all of them through
unpicklers that know a fixed list of classes; a folder that passes holds nothing that an unrestricted reader could run.
"""

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from qwen3_vlm.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"
CONFIG_FILE = "metadata.json"
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json of every checkpoint that this version writes; another backend would be read by other code."""
_CLASSES = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}
"""Module -> names that `.metadata` may refer to, besides torch's dtypes. All of them only hold values."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which is not on the list of a checkpoint's classes"
        )


def read_metadata(directory: Path) -> Metadata:
    """`.metadata` of a state folder, through a restricted unpickler.

    Raises:
        CheckpointError: it is missing or damaged; it refers to anything but checkpoint classes, to files that are
            elsewhere, missing or too short, or to transforms of what they hold.
    """
    path = directory / METADATA
    with _refusing(path), path.open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not a checkpoint's Metadata")
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if Path(name).name != name:
                raise pickle.UnpicklingError(f"it refers to the file {name!r} outside its folder")
            # torch would transform the bytes before it unpickles them: what `read_objects` checks is not what it reads
            transforms = getattr(stored, "transform_descriptors", None)
            if transforms:
                raise pickle.UnpicklingError(f"it asks for the transforms {transforms!r} of {name}, expected none")
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        with _refusing(directory / name):
            size = (directory / name).stat().st_size
            if size < end:
                raise ValueError(f"it has {size} bytes, {METADATA} expects {end}")
    return metadata


def check(directory: Path) -> None:
    """Refuse a state folder whose reading could run code; call it before megatron-core reads the folder.

    Raises:
        CheckpointError: a pickle of the folder refers to anything but values and tensors, or a file is missing.
    """
    path = directory / CONFIG_FILE
    with _refusing(path):
        config = json.loads(path.read_text())
        if config != CONFIG:
            raise ValueError(f"it says {config}, this version reads {CONFIG}")
    read_objects(directory)


def read_objects(directory: Path) -> dict[str, Any]:
    """Everything in a state folder that is no tensor of its own: common.pt's entries (param groups, schedule), and the
    byte entries (random states) by their names in the checkpoint; values and tensors only.

    Raises:
        CheckpointError: a pickle refers to anything but values and tensors, or a file is missing.
    """
    metadata = read_metadata(directory)
    with _refusing(directory / COMMON):
        objects = torch.load(directory / COMMON, map_location="cpu", weights_only=True)
        if not isinstance(objects, dict):
            raise pickle.UnpicklingError(f"it holds a {type(objects).__name__}, not a dict")
    for index, stored in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue  # tensors are read with weights_only by torch itself
        path = directory / stored.relative_path
        with _refusing(path, f"entry {index.fqn}"), path.open("rb") as file:
            file.seek(stored.offset)
            objects[index.fqn] = torch.load(io.BytesIO(file.read(stored.length)), map_location="cpu", weights_only=True)
    return objects


@contextmanager
def _refusing(path: Path, part: str = "") -> Iterator[None]:
    """Turn whatever a damaged or hostile file raises into one CheckpointError that names the file."""
    where = f"{path} ({part})" if part else f"{path}"
    try:
        yield
    except FileNotFoundError as e:
        raise CheckpointError(f"{where} is missing: the checkpoint is incomplete, use another one") from e
    except Exception as e:  # a pickle may raise anything
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        reason = next((line for line in lines if "GLOBAL" in line), lines[0])  # torch.load's verdict
        raise CheckpointError(
            f"{where} is not read: {reason.rstrip('.')}. The checkpoint is damaged, or was made to run "
            "code on whoever reads it: use one from a source that you trust."
        ) from e
