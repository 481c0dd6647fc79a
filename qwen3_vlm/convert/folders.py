"""What a Hugging Face folder says of itself: the sizes in its config.json, and its small files.

Three kinds are read: a Qwen3 (dense), a SigLIP (whole or vision only), and our own exports, which hold both and the
connector. Nothing of a folder is executed: JSON, safetensors and tokenizer files are all that is opened.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, SiglipVisionConfig

from qwen3_vlm.checkpoint.layout import IMAGE_PROCESSOR_FILE, TOKENIZER_FILES
from qwen3_vlm.config.schema import DecoderConfig, LatentInit, Resample, ResamplerConfig, SiglipEncoderConfig
from qwen3_vlm.errors import WeightsError

EXPORT_MODEL_TYPE = "qwen3_siglip_vlm"
"""config.json's model_type of a folder that tools/convert.py export wrote."""
PIL_RESAMPLE = {2: Resample.bilinear, 3: Resample.bicubic}
"""PIL.Image.Resampling codes that preprocessor_config.json may name."""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing: give the folder of a Hugging Face model")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return value


def is_export(folder: Path) -> bool:
    """Whether tools/convert.py export wrote a folder."""
    return bool(_read_json(folder / "config.json").get("model_type") == EXPORT_MODEL_TYPE)


def is_whole_export(llm: Path, vision: Path) -> bool:
    """Whether both are the same export: then its connector is taken too."""
    return llm.resolve() == vision.resolve() and is_export(llm)


def _section(folder: Path, export_key: str) -> dict[str, Any]:
    """config.json, or the part of an export's."""
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") != EXPORT_MODEL_TYPE:
        return raw
    if not isinstance(raw.get(export_key), dict):
        raise WeightsError(f"{folder}/config.json is of {EXPORT_MODEL_TYPE} and has no {export_key}: export it again")
    section: dict[str, Any] = raw[export_key]
    return section


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Sizes of a Qwen3 dense model, alone or in an export, from config.json.

    Raises:
        WeightsError: another architecture, or a variant of Qwen3 that this decoder does not compute.
    """
    raw = _section(folder, "text_config")
    if raw.get("model_type") != "qwen3":
        raise WeightsError(
            f"{folder}/config.json has model_type {raw.get('model_type')!r}; --llm needs qwen3 (dense) or an "
            "export of ours"
        )
    config = Qwen3Config.from_dict(raw)
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else {"rope_theta": config.rope_theta}
    unsupported = {
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.use_sliding_window,
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "rope_type": rope.get("rope_type", "default") != "default" and rope["rope_type"],
        "rope_scaling": raw.get("rope_scaling"),
    }
    found = {k: v for k, v in unsupported.items() if v}
    if found:
        raise WeightsError(f"{folder}/config.json asks for {found}, which this decoder does not compute")
    return DecoderConfig(
        name=folder.resolve().name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=float(rope["rope_theta"]),
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def read_encoder_config(folder: Path) -> SiglipEncoderConfig:
    """Sizes and image preparation of a SigLIP tower, alone or in an export, from config.json and
    preprocessor_config.json.

    Raises:
        WeightsError: another architecture, or an image preparation that the tower's data path does not do.
    """
    raw = _section(folder, "vision_config")
    if raw.get("model_type") not in ("siglip", "siglip_vision_model"):
        raise WeightsError(
            f"{folder}/config.json has model_type {raw.get('model_type')!r}; --vision needs siglip or "
            "siglip_vision_model (SigLIP2's fixed-resolution models are of these types too), or an export of ours"
        )
    config = SiglipVisionConfig.from_dict(raw.get("vision_config", raw))
    if config.hidden_act != "gelu_pytorch_tanh":
        raise WeightsError(f"{folder}: hidden_act {config.hidden_act!r}, expected gelu_pytorch_tanh")
    processor = _read_json(folder / IMAGE_PROCESSOR_FILE)
    expected: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    other = {key: processor[key] for key, value in expected.items() if processor.get(key, value) != value}
    resample = processor.get("resample", 3)
    if other or resample not in PIL_RESAMPLE:
        raise WeightsError(
            f"{folder}/{IMAGE_PROCESSOR_FILE} asks for {other or {'resample': resample}}, which the data path does not "
            f"do; expected { {key: expected[key] for key in other} or f'resample one of {sorted(PIL_RESAMPLE)}' }"
        )
    mean, std = (processor.get(key, [0.5, 0.5, 0.5]) for key in ("image_mean", "image_std"))
    return SiglipEncoderConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        feature_layer=_read_json(folder / "config.json").get("feature_layer", -1),
        resample=PIL_RESAMPLE[resample],
        image_mean=tuple(mean),
        image_std=tuple(std),
    )


def read_resampler_config(folder: Path) -> ResamplerConfig:
    """The resampler of an export.

    Raises:
        WeightsError: config.json does not describe it.
    """
    raw = _read_json(folder / "config.json")
    try:
        return ResamplerConfig(
            num_tokens=raw["resampler_num_tokens"],
            depth=raw["resampler_depth"],
            latent_init=LatentInit(raw["resampler_latent_init"]),
            ffn_multiplier=raw["resampler_ffn_multiplier"],
        )
    except (KeyError, ValueError) as e:
        raise WeightsError(f"{folder}/config.json does not describe the resampler ({e!r}): export it again") from e


def copy_processor_files(llm: Path, vision: Path, target: Path) -> None:
    """Tokenizer files of the decoder and the image processor of the tower; only files of known names.

    Raises:
        WeightsError: tokenizer.json is missing.
    """
    if not (llm / "tokenizer.json").is_file():
        raise WeightsError(f"{llm}/tokenizer.json is missing: the checkpoint needs the decoder's fast tokenizer")
    target.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (llm / name).is_file():
            shutil.copyfile(llm / name, target / name)
    shutil.copyfile(vision / IMAGE_PROCESSOR_FILE, target / IMAGE_PROCESSOR_FILE)
