"""The architecture that an import writes: sizes from the folders' config.json, connector from the command line."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_vlm.config.compose import compose, modality_from_dict, to_dict
from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig
from qwen3_vlm.convert.hf import read_decoder_config, read_encoder_config
from qwen3_vlm.errors import ConfigError

IMAGE = "image"


def architecture_of(
    llm: Path, vision: Path, overrides: Sequence[str]
) -> tuple[DecoderConfig, dict[str, ModalityConfig]]:
    """Sizes of a whole VLM.

    Args:
        llm, vision: Hugging Face folders.
        overrides: `model=NAME` (checked against the folder) and `modality.image.<key>=value` for what the folders do
            not say.

    Returns:
        Decoder and modalities.

    Raises:
        ConfigError: an override is unknown, or disagrees with the folder.
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
    modality = replace(asked, encoder=replace(encoder, feature_layer=asked.encoder.feature_layer))
    return decoder, modality_from_dict({IMAGE: to_dict(modality)})


def _check_same(asked: dict[str, Any], found: dict[str, Any], selection: str, folder: Path) -> None:
    different = [f"{k}: {asked[k]!r} in {selection}, {found[k]!r} in the folder" for k in asked if asked[k] != found[k]]
    if different:
        raise ConfigError(f"{folder} is not {selection}: {'; '.join(different)}")
