"""Which modalities exist: one line each."""

from collections.abc import Mapping

from qwen3_vlm.config.schema import ModalityConfig
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.modality.base import Modality
from qwen3_vlm.modality.image import ImageModality

MODALITIES: dict[str, type[Modality]] = {"image": ImageModality}


def build_modalities(configs: Mapping[str, ModalityConfig]) -> dict[str, Modality]:
    """Build the run's modalities.

    Args:
        configs: the `modality` part of the run's configuration, by name.

    Returns:
        Modalities by name, in the order of `configs`.

    Raises:
        ConfigError: a name is not in MODALITIES, or two modalities share a sentinel or a placeholder token.
    """
    unknown = sorted(set(configs) - set(MODALITIES))
    if unknown:
        raise ConfigError(f"unknown modality {', '.join(unknown)}: this code has {', '.join(sorted(MODALITIES))}")
    modalities = {name: MODALITIES[name](config) for name, config in configs.items()}
    for mark in ("sentinel", "placeholder"):
        owners: dict[object, str] = {}
        for name, modality in modalities.items():
            value = getattr(modality, mark)
            value = value.pad if mark == "placeholder" else value
            if value in owners:
                raise ConfigError(f"modalities {owners[value]} and {name} share the {mark} {value}")
            owners[value] = name
    return modalities
