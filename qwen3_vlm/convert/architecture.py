"""The architecture that an import writes: sizes from the folders' config.json, connector from the command line."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_vlm.config.compose import compose, modality_from_dict, to_dict
from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, ParallelConfig
from qwen3_vlm.config.validate import check_modality
from qwen3_vlm.convert.folders import (
    is_whole_export,
    read_decoder_config,
    read_encoder_config,
    read_resampler_config,
)
from qwen3_vlm.errors import ConfigError

IMAGE = "image"


def architecture_of(
    llm: Path, vision: Path, overrides: Sequence[str]
) -> tuple[DecoderConfig, dict[str, ModalityConfig]]:
    """Sizes of a whole VLM.

    Args:
        llm, vision: Hugging Face folders; the same export of ours for both gives the connector too.
        overrides: `model=NAME` (checked against the folder) and `modality.image.<key>=value` for what the folders do
            not say.

    Returns:
        Decoder and modalities.

    Raises:
        ConfigError: an override is unknown, disagrees with the folder, or is out of range.
        WeightsError: a folder is of another architecture.
    """
    decoder = read_decoder_config(llm)
    selections = [o for o in overrides if "=" in o and o.split("=", 1)[0] == "model"]
    keys = [o for o in overrides if o not in selections]
    strange = [
        o for o in keys if not o.startswith((f"modality.{IMAGE}.resampler.", f"modality.{IMAGE}.encoder.feature_layer"))
    ]
    if strange:
        raise ConfigError(
            f"import takes model=NAME, modality.{IMAGE}.resampler.<key>=... and modality.{IMAGE}.encoder."
            "feature_layer=...; "
            f"found {strange[0]!r}. Everything else comes from the folders' config.json."
        )
    run = compose("stage1_align", ["exp_dir=unused", "data.path=unused", *selections, *keys])
    if selections:
        decoder = replace(decoder, name=run.model.name)
        _check_same(to_dict(run.model), to_dict(decoder), selections[0], llm)
    encoder = read_encoder_config(vision)
    asked = run.modality[IMAGE]
    if any(key.startswith(f"modality.{IMAGE}.encoder.feature_layer") for key in keys):
        encoder = replace(encoder, feature_layer=asked.encoder.feature_layer)
    modality = replace(asked, encoder=encoder)
    if is_whole_export(llm, vision):
        trained = replace(modality, encoder=read_encoder_config(vision), resampler=read_resampler_config(vision))
        _check_connector(modality, trained, keys, vision)
        modality = trained
    check_modality(f"modality.{IMAGE}", modality, ParallelConfig(), modality.resampler.num_tokens + 2)
    return decoder, modality_from_dict({IMAGE: to_dict(modality)})


def _check_connector(asked: ModalityConfig, trained: ModalityConfig, keys: Sequence[str], folder: Path) -> None:
    """What the command line says of a connector that comes trained must be what it is."""
    for override in keys:
        key = override.partition("=")[0]
        part, field = key.removeprefix(f"modality.{IMAGE}.").split(".")
        wanted, found = (to_dict(getattr(m, part))[field] for m in (asked, trained))
        if wanted != found:
            raise ConfigError(
                f"{folder} holds a connector that was trained with {field} {found!r}; {override!r} disagrees. Leave it "
                "out, or give a Qwen3 and a SigLIP folder for a fresh connector."
            )


def _check_same(asked: dict[str, Any], found: dict[str, Any], selection: str, folder: Path) -> None:
    different = [f"{k}: {asked[k]!r} in {selection}, {found[k]!r} in the folder" for k in asked if asked[k] != found[k]]
    if different:
        raise ConfigError(f"{folder} is not {selection}: {'; '.join(different)}")
