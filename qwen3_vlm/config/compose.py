"""conf/ and a command line -> one frozen RunConfig, or a ConfigError that names the key. Only this file knows Hydra.

    overrides    parsed by Hydra's grammar; each key is checked against the schema, `+` and `++` or not
    composition  Hydra merges the config, its groups and the overrides into one tree
    checkpoint   with model=from_checkpoint, the decoder and the modalities are those of checkpoint.init_from
    build        tree.from_dict turns the tree into the schema's dataclasses, strictly

The trainer passes through here twice: once by `compose`, and once more by `from_hydra`, with what NeMo's hydra_runner
composed from the same command line.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, RunConfig
from qwen3_vlm.config.tree import (
    decoder_from_dict,
    from_dict,
    known_keys,
    modality_from_dict,
    nearest,
    to_dict,
    to_yaml,
    unknown_key,
)
from qwen3_vlm.errors import ConfigError

__all__ = [
    "CommandLine",
    "HydraSchema",
    "compose",
    "conf_dir",
    "config_names",
    "decoder_from_dict",
    "from_dict",
    "from_hydra",
    "group_options",
    "modality_from_dict",
    "parse_command_line",
    "to_dict",
    "to_yaml",
]

FROM_CHECKPOINT = "from_checkpoint"
BASE_CONFIG = "train"
"""The defaults list that every stage starts from; what --help shows without --config-name."""


class Architecture(Protocol):
    """The model that a checkpoint holds."""

    @property
    def model(self) -> DecoderConfig: ...

    @property
    def modality(self) -> dict[str, ModalityConfig]: ...


ReadArchitecture = Callable[[str], Architecture]


def compose(
    config_name: str, overrides: Sequence[str] = (), *, read_architecture: ReadArchitecture | None = None
) -> RunConfig:
    """Compose a run's configuration.

    Args:
        config_name: a file at the top of conf/, without its suffix.
        overrides: `key=value` and `group=option`, in Hydra's grammar.
        read_architecture: reads the model that a checkpoint holds, for model=from_checkpoint.

    Raises:
        ConfigError: a name, key or option is not known, or a value is not set, of a wrong type or not the checkpoint's.
    """
    parsed = [_parse_one(text) for text in overrides]
    return _build(_plain(_compose_tree(config_name, parsed)), parsed, read_architecture)


def from_hydra(
    config: DictConfig, overrides: Sequence[str], *, read_architecture: ReadArchitecture | None = None
) -> RunConfig:
    """Build what `compose` builds, from a tree that hydra_runner composed.

    Args:
        config: the tree.
        overrides: the command line's, as for `compose`.
        read_architecture: as for `compose`.

    Raises:
        ConfigError: as `compose`.
    """
    return _build(_plain(config), [_parse_one(text) for text in overrides], read_architecture)


@dataclass
class HydraSchema:
    """What hydra_runner checks a tree against: these sections and no others. `from_hydra` checks what is in them."""

    exp_dir: str = MISSING
    model: dict[str, Any] = MISSING
    modality: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    parallel: dict[str, Any] = MISSING
    precision: dict[str, Any] = MISSING
    optim: dict[str, Any] = MISSING
    train: dict[str, Any] = MISSING
    checkpoint: dict[str, Any] = MISSING
    logging: dict[str, Any] = MISSING


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A trainer's command line, checked."""

    config_name: str
    overrides: list[str]
    """As given."""
    hydra_argv: list[str]
    """The same for Hydra, in a form that it accepts for every key of the schema, set in YAML or not."""
    shows: bool
    """Only --help, --cfg or --info is asked for: Hydra answers, and nothing runs."""


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Check `--config-name NAME key=value ...` before Hydra sees it.

    Args:
        argv: arguments without the program's name.

    Raises:
        ConfigError: a name, key or option is not known.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("overrides", nargs="*")
    try:
        arguments, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if unknown:
        raise ConfigError(
            f"unknown option {unknown[0]!r}; options are --config-name, --help, --cfg, --info and key=value"
        )
    shows = arguments.help or arguments.cfg is not None or arguments.info is not None
    name = arguments.config_name
    if name is None and not shows:
        raise ConfigError(f"no config name; give --config-name NAME, one of: {', '.join(config_names())}")
    name = name or BASE_CONFIG
    parsed = [_parse_one(text) for text in arguments.overrides]
    _compose_tree(name, parsed)
    flags = ["--help"] * arguments.help + ["--resolve"] * arguments.resolve
    flags += [f"--cfg={arguments.cfg}"] * (arguments.cfg is not None)
    flags += [f"--info={arguments.info}"] * (arguments.info is not None)
    return CommandLine(
        config_name=name,
        overrides=arguments.overrides,
        hydra_argv=["--config-name", name, *flags, *map(_canonical, parsed)],
        shows=shows,
    )


def conf_dir() -> Path:
    """Find conf/: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def config_names() -> list[str]:
    """Name the configs that --config-name takes."""
    return sorted(path.stem for path in conf_dir().glob("*.yaml"))


def group_options() -> dict[str, list[str]]:
    """Name conf's groups and the options of each."""
    groups = sorted(path for path in conf_dir().iterdir() if path.is_dir())
    return {group.name: sorted(option.stem for option in group.glob("*.yaml")) for group in groups}


def _parse_one(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"cannot read {text!r}: {error}; write key=value, and quote special characters: \"key='a=b'\""
        ) from error
    if override.package is not None:
        raise ConfigError(f"{text!r}: an option cannot be moved to another place ('@')")
    if override.is_delete():
        raise ConfigError(f"{text!r}: a key cannot be removed; set it to another value")
    if override.is_sweep_override():
        raise ConfigError(f"{text!r}: several values; one run takes one (a list is written [a,b])")
    return override


def _is_selection(override: Override) -> bool:
    """Tell `group=option` from `key=value`."""
    return override.key_or_group in group_options()


def _canonical(override: Override) -> str:
    """Write an override so that Hydra sets the key, also one that no YAML mentions: `_check_keys` has checked it."""
    prefix = "" if _is_selection(override) else "++"
    return f"{prefix}{override.key_or_group}={override.get_value_string()}"


def _compose_tree(config_name: str, overrides: Sequence[Override]) -> DictConfig:
    """Let Hydra compose a config and its groups, check every key, and set the keys."""
    if config_name not in config_names():
        raise ConfigError(f"unknown config {config_name!r}; known configs: {', '.join(config_names())}")
    selections = [override for override in overrides if _is_selection(override)]
    assignments = [override for override in overrides if not _is_selection(override)]
    _check_selections(selections)
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            tree = hydra.compose(config_name, [_canonical(override) for override in selections])
        _check_keys(assignments, tree)
        for override in assignments:
            OmegaConf.update(tree, override.key_or_group, override.value(), merge=True, force_add=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot compose {config_name!r}: {error}") from error
    return tree


def _check_selections(selections: Sequence[Override]) -> None:
    known = group_options()
    groups = [override.key_or_group for override in selections]
    for override in selections:
        group, value = override.key_or_group, override.value()
        if groups.count(group) > 1:
            raise ConfigError(f"{group} is chosen {groups.count(group)} times; choose one option")
        if isinstance(value, list) and group != "modality":
            raise ConfigError(f"{override.input_line}: only modality takes a list of options")
        options: list[Any] = value if isinstance(value, list) else [value]
        for option in options:
            if option not in known[group]:
                close = nearest(str(option), known[group])
                raise ConfigError(
                    f"unknown option {option!r} of {group}; the nearest is {close!r}, known: {', '.join(known[group])}"
                )
        if group == "modality":
            _check_disjoint(options)


def _check_disjoint(options: Sequence[str]) -> None:
    """Refuse two options that define one modality: the second would overwrite the first key by key."""
    owner: dict[str, str] = {}
    for option in options:
        for name in OmegaConf.load(conf_dir() / "modality" / f"{option}.yaml"):
            if name in owner:
                raise ConfigError(f"modality options {owner[name]!r} and {option!r} both define {name!r}; choose one")
            owner[str(name)] = option


def _check_keys(assignments: Sequence[Override], tree: Mapping[str, Any]) -> None:
    """Refuse a key that the schema does not have, given the modalities of `tree` and those that assignments define."""
    kinds = {name: modality.get("encoder", {}).get("kind") for name, modality in tree.get("modality", {}).items()}
    for override in assignments:
        match override.key_or_group.split("."):
            case ["modality", name, "encoder", "kind"]:
                kinds[name] = str(override.value())
    known = known_keys(kinds)
    for override in assignments:
        if override.key_or_group not in known:
            raise unknown_key(override.key_or_group, known)


def _plain(tree: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve an interpolation: {error}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _build(
    tree: dict[str, Any], overrides: Sequence[Override], read_architecture: ReadArchitecture | None
) -> RunConfig:
    if tree.get("model", {}).get("name") == FROM_CHECKPOINT:
        tree = _with_architecture(tree, overrides, read_architecture)
    return from_dict(tree)


def _with_architecture(
    tree: dict[str, Any], overrides: Sequence[Override], read_architecture: ReadArchitecture | None
) -> dict[str, Any]:
    """Put the checkpoint's decoder and modalities into `tree`; what the command line says of them has to agree."""
    path = tree.get("checkpoint", {}).get("init_from")
    if path is None:
        raise ConfigError("model=from_checkpoint needs the checkpoint: add checkpoint.init_from=CKPT")
    if read_architecture is None:
        raise ConfigError("model=from_checkpoint is not possible here; choose model= and modality= by name")
    architecture = read_architecture(path)
    stored = {"model": to_dict(architecture.model), "modality": to_dict(architecture.modality)}
    asked = {"model": tree["model"], "modality": to_dict(modality_from_dict(tree.get("modality", {})))}
    for override in overrides:
        if override.key_or_group == "modality" or override.key_or_group.startswith(("model.", "modality.")):
            for key in _keys_set_by(override):
                _check_agreement(key, asked, stored, path)
    return {**tree, **stored}


def _keys_set_by(override: Override) -> list[str]:
    """`a.b={c: 1}` sets a.b.c and leaves the rest of a.b alone."""
    key, value = override.key_or_group, override.value()
    return [f"{key}.{name}" for name, _ in _leaves(value, "")] if isinstance(value, dict) else [key]


def _check_agreement(key: str, asked: Mapping[str, Any], stored: Mapping[str, Any], path: str) -> None:
    """Compare all values under `key`."""
    asked_values = dict(_leaves(asked, key))
    stored_values = dict(_leaves(stored, key))
    for leaf in asked_values | stored_values:
        ours, theirs = asked_values.get(leaf, "absent"), stored_values.get(leaf, "absent")
        if ours != theirs:
            raise ConfigError(
                f"{leaf} is {ours!r} on the command line and {theirs!r} in checkpoint.init_from={path}; "
                f"with model=from_checkpoint the checkpoint decides: remove {key}=..."
            )


def _leaves(tree: Any, key: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every value that stands at or below `key`; "" is all."""
    if isinstance(tree, Mapping):
        for name, item in tree.items():
            yield from _leaves(item, key, f"{path}.{name}" if path else str(name))
    elif not key or path == key or path.startswith(f"{key}."):
        yield path, tree
