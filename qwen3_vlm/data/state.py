"""energon's loader state <-> plain containers, so that a checkpoint is read without unpickling anyone's classes."""

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

_CLASSES = {
    cls.__name__: cls
    for cls in (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SliceState, SystemRngState)
}
_TYPE = "__type__"


def encode_state(value: Any) -> Any:
    """Replace energon's classes, arrays and bytes by tagged dicts of plain values and tensors.

    Raises:
        TypeError: the state holds a type that this table does not know.
    """
    match value:
        case None | bool() | int() | float() | str() | torch.Tensor():
            return value
        case bytes():
            return {_TYPE: "bytes", "data": torch.frombuffer(bytearray(value), dtype=torch.uint8)}
        case np.ndarray():
            return {_TYPE: "ndarray", "dtype": value.dtype.str, "data": torch.from_numpy(value.astype(np.int64))}
        case list():
            return [encode_state(item) for item in value]
        case tuple():
            return tuple(encode_state(item) for item in value)
        case FlexState():
            return {_TYPE: "FlexState", "data": {key: encode_state(item) for key, item in value.items()}}
        case dict():
            return {key: encode_state(item) for key, item in value.items()}
    if type(value) not in _CLASSES.values():
        raise TypeError(f"energon's state holds a {type(value).__qualname__}, which {__name__} cannot save")
    fields = {field.name: encode_state(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {_TYPE: type(value).__name__, "data": fields}


def decode_state(value: Any) -> Any:
    """Inverse of `encode_state`."""
    match value:
        case {"__type__": "bytes", "data": data}:
            return data.numpy().tobytes()
        case {"__type__": "ndarray", "dtype": dtype, "data": data}:
            return data.numpy().astype(dtype)
        case {"__type__": "FlexState", "data": data}:
            return FlexState({key: decode_state(item) for key, item in data.items()})
        case {"__type__": name, "data": data}:
            return _CLASSES[name](**{key: decode_state(item) for key, item in data.items()})
        case dict():
            return {key: decode_state(item) for key, item in value.items()}
        case list():
            return [decode_state(item) for item in value]
        case tuple():
            return tuple(decode_state(item) for item in value)
    return value
