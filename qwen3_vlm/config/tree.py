"""The way between plain dicts (YAML, JSON) and the schema's frozen dataclasses, strict in both directions.

A dict that names an unknown key, lacks a required one or holds a value of another type is refused with the key's full
name. Nothing here knows Hydra, so a checkpoint's JSON goes the same way as a run's YAML.
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING

from qwen3_vlm.config.schema import ENCODERS, DecoderConfig, ModalityConfig, RunConfig
from qwen3_vlm.errors import ConfigError

T = TypeVar("T")


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """Build a run's configuration from nested dicts.

    Args:
        tree: what `to_dict` returns; keys that it lacks take the schema's defaults.

    Raises:
        ConfigError: a key is unknown or not set, or a value has another type than the schema says.
    """
    return _build_checked(RunConfig, tree, "")


def decoder_from_dict(tree: Mapping[str, Any]) -> DecoderConfig:
    """As `from_dict`, for the `model` part alone."""
    return _build_checked(DecoderConfig, tree, "model")


def modality_from_dict(tree: Mapping[str, Any]) -> dict[str, ModalityConfig]:
    """As `from_dict`, for the `modality` part alone: modality name -> its configuration."""
    return _build_checked(dict[str, ModalityConfig], tree, "modality")


def to_dict(config: Any) -> Any:
    """Turn a configuration, or a part of it, into what YAML and JSON hold: dict, list, str, numbers, bool and None."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config.value if isinstance(config, Enum) else config


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML, in the schema's order; `from_dict(yaml.safe_load(...))` gives it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def known_keys(modalities: Mapping[str, str]) -> set[str]:
    """Name every key of a run, groups included, with dots.

    Args:
        modalities: modality name -> kind of its encoder.
    """
    keys = _keys_of(RunConfig, "")
    for name, kind in modalities.items():
        path = f"modality.{name}"
        keys |= {path, f"{path}.encoder.kind"} | _keys_of(ModalityConfig, path)
        if kind in ENCODERS:
            keys |= _keys_of(ENCODERS[kind], f"{path}.encoder")
    return keys


def nearest(key: str, known: Iterable[str]) -> str:
    """Find the known key that was most likely meant; the last part of a dotted key counts twice."""
    parent, _, leaf = key.rpartition(".")

    def likeness(candidate: str) -> float:
        known_parent, _, known_leaf = candidate.rpartition(".")
        return _ratio(parent, known_parent) + 2 * _ratio(leaf, known_leaf)

    return max(sorted(known), key=likeness)


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """Make the error for a key that does not exist, with the nearest one that does."""
    return ConfigError(f"unknown key {key!r}; the nearest known key is {nearest(key, known)!r}")


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _keys_of(cls: type, path: str) -> set[str]:
    keys = set()
    for name, annotation in get_type_hints(cls).items():
        key = _join(path, name)
        keys.add(key)
        if is_dataclass(annotation) and isinstance(annotation, type):
            keys |= _keys_of(annotation, key)
    return keys


def _build_checked(annotation: type[T], tree: Any, path: str) -> T:
    missing: list[str] = []
    built = _build(annotation, tree, path, missing)
    if missing:
        raise ConfigError(
            f"not set: {', '.join(missing)}; give each on the command line, e.g. {missing[0]}=..., or in a conf file"
        )
    return built


def _build(annotation: Any, value: Any, path: str, missing: list[str]) -> Any:
    """Convert `value` to `annotation`; keys that are not set are added to `missing`, to be reported at once."""
    if isinstance(value, str) and value == MISSING:
        missing.append(path)
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if is_dataclass(annotation) and isinstance(annotation, type):
        return _build_dataclass(annotation, value, path, missing)
    if origin is dict and isinstance(value, Mapping):
        return {key: _build(args[1], item, _join(path, key), missing) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_build(args[0], item, f"{path}[{index}]", missing) for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        pairs = zip(args, value, strict=True)
        return tuple(_build(arg, item, f"{path}[{index}]", missing) for index, (arg, item) in enumerate(pairs))
    if origin in (Union, types.UnionType):
        (inner,) = [arg for arg in args if arg is not type(None)]
        return None if value is None else _build(inner, value, path, missing)
    if _is_scalar_of(annotation, value):
        converts = annotation is float or (isinstance(annotation, type) and issubclass(annotation, Enum))
        return annotation(value) if converts else value
    raise _wrong_type(annotation, value, path)


def _is_scalar_of(annotation: Any, value: Any) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if not isinstance(annotation, type):
        return False
    if issubclass(annotation, Enum):
        return value in [member.value for member in annotation]
    if annotation is bool or isinstance(value, bool):
        return annotation is bool and isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float))
    return annotation in (int, str) and isinstance(value, annotation)


def _build_dataclass(cls: type, value: Any, path: str, missing: list[str]) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong_type(cls, value, path)
    hints = get_type_hints(cls)
    for key in value:
        if key not in hints:
            raise unknown_key(_join(path, str(key)), [_join(path, name) for name in hints])
    if cls is ModalityConfig:
        hints["encoder"] = _encoder_class(value, path)
    parts = {
        field.name: value[field.name] if field.name in value else to_dict(_default(field)) for field in fields(cls)
    }
    return cls(**{name: _build(hints[name], part, _join(path, name), missing) for name, part in parts.items()})


def _default(field: "Field[Any]") -> Any:
    """A field's default as the schema states it; every field has one, required ones have MISSING."""
    return field.default if field.default_factory is NO_DEFAULT else field.default_factory()


def _encoder_class(modality: Mapping[str, Any], path: str) -> type:
    """Choose an encoder's dataclass by its `kind`."""
    encoder = modality.get("encoder", MISSING)
    kind = encoder.get("kind", MISSING) if isinstance(encoder, Mapping) else MISSING
    if kind not in ENCODERS:
        raise ConfigError(f"{path}.encoder.kind is {kind!r}; known kinds: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[kind]


def _wrong_type(annotation: Any, value: Any, path: str) -> ConfigError:
    hint = f"; to make it text, quote it: \"{path}='{value}'\"" if annotation is str else ""
    return ConfigError(f"{path}: expected {_describe(annotation)}, found {value!r} ({type(value).__name__}){hint}")


def _describe(annotation: Any) -> str:
    """A type in a user's words."""
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _describe(arg) for arg in args)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    if get_origin(annotation) is list:
        return f"a list of {_describe(args[0])}"
    if get_origin(annotation) is tuple:
        return f"a list of {len(args)} {_describe(args[0])}"
    if get_origin(annotation) is dict or is_dataclass(annotation):
        return "a mapping of keys"
    return str(annotation.__name__)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
