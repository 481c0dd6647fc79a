"""What a checkpoint's state folder holds, whole and by name, whatever layout wrote it."""

import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

GRADIENT = "optimizer.state.exp_avg."
"""Start of the name under which a save holds, after the first step, (1 - beta1) * gradient of a tensor."""


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors whose names start with the prefix; layers of a stack one by one, as `name[layer]`."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and name.startswith(prefix)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    stacks = {name for name in tensors if re.search(r"\.layers\.(?!\d)", name)}
    layers = {f"{name}[{n}]": layer for name in stacks for n, layer in enumerate(tensors[name])}
    return {name: tensor for name, tensor in tensors.items() if name not in stacks} | layers


def relative_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Name -> |a - b| / |a|, norms over a tensor; both have the same names."""
    assert a.keys() == b.keys()
    return {name: float((b[name].double() - x.double()).norm() / x.double().norm()) for name, x in a.items()}
