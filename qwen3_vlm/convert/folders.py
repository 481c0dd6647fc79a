"""What a Hugging Face folder says of itself: the sizes in its config.json, and its small files.

Three kinds are read: a Qwen3 (dense), a SigLIP (whole or vision only), and our own exports, which hold both and the
connector. Nothing of a folder is executed: JSON, safetensors and tokenizer files are all that is opened.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import transformers
from tokenizers import Tokenizer
from transformers import PretrainedConfig, Qwen3Config, SiglipVisionConfig

from qwen3_vlm.checkpoint.layout import IMAGE_PROCESSOR_FILE, TOKENIZER_FILES
from qwen3_vlm.config.schema import (
    DecoderConfig,
    LatentInit,
    ModalityConfig,
    Resample,
    ResamplerConfig,
    SiglipEncoderConfig,
)
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import WeightsError
from qwen3_vlm.modality.registry import build_modalities

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


_Config = TypeVar("_Config", bound=PretrainedConfig)


def _config(kind: type[_Config], raw: object, folder: Path) -> _Config:
    """transformers' reading of config.json, with its defaults."""
    try:
        if not isinstance(raw, dict):
            raise TypeError(f"expected an object, found {raw!r}")
        config: _Config = kind.from_dict(raw)
    except Exception as e:  # transformers checks with classes of its own
        reason = " ".join(str(e).split()) or type(e).__name__
        raise WeightsError(f"{folder}/config.json is no {kind.__name__} ({reason}): fetch it again") from e
    return config


def _check_sizes(folder: Path, config: PretrainedConfig, *keys: str) -> None:
    """Sizes are whole numbers above 0."""
    for key in keys:
        value = getattr(config, key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise WeightsError(f"{folder}/config.json has {key} {value!r}, expected a whole number above 0")


def _check_divisible(folder: Path, config: PretrainedConfig, key: str, by: str) -> None:
    value, divisor = getattr(config, key), getattr(config, by)
    if value % divisor:
        raise WeightsError(f"{folder}/config.json has {key} {value}, which is not divisible by its {by} {divisor}")


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
    config = _config(Qwen3Config, raw, folder)
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else {"rope_theta": config.rope_theta}
    for key, value in {"rope_theta": rope.get("rope_theta"), "rms_norm_eps": config.rms_norm_eps}.items():
        if not _is_number(value):
            raise WeightsError(f"{folder}/config.json has {key} {value!r}, expected a number")
    heads = ("num_attention_heads", "num_key_value_heads")
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim", "vocab_size")
    _check_sizes(folder, config, *sizes, "max_position_embeddings", *heads)
    _check_divisible(folder, config, *heads)
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
    config = _config(SiglipVisionConfig, raw.get("vision_config", raw), folder)
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    _check_sizes(folder, config, *sizes)
    _check_divisible(folder, config, "hidden_size", "num_attention_heads")
    if config.num_channels != 3:
        raise WeightsError(f"{folder}/config.json has num_channels {config.num_channels}, expected 3 (RGB)")
    if config.hidden_act != "gelu_pytorch_tanh":
        raise WeightsError(f"{folder}: hidden_act {config.hidden_act!r}, expected gelu_pytorch_tanh")
    processor = _read_json(folder / IMAGE_PROCESSOR_FILE)
    expected: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_center_crop": False,
        "do_pad": False,
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    other = {key: processor[key] for key, value in expected.items() if processor.get(key) not in (None, value)}
    resample = processor.get("resample", 3)
    if other or resample not in PIL_RESAMPLE:
        raise WeightsError(
            f"{folder}/{IMAGE_PROCESSOR_FILE} asks for {other or {'resample': resample}}, which the data path does not "
            f"do; expected { {key: expected[key] for key in other} or f'resample one of {sorted(PIL_RESAMPLE)}' }"
        )
    mean, std = (_channels(folder, processor, key) for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise WeightsError(f"{folder}/{IMAGE_PROCESSOR_FILE} has image_std {std}, expected numbers above 0")
    feature_layer = _read_json(folder / "config.json").get("feature_layer", -1)
    if type(feature_layer) is not int:
        raise WeightsError(f"{folder}/config.json has feature_layer {feature_layer!r}, expected a whole number below 0")
    return SiglipEncoderConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        feature_layer=feature_layer,
        resample=PIL_RESAMPLE[resample],
        image_mean=mean,
        image_std=std,
    )


def _channels(folder: Path, processor: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = processor.get(key, [0.5, 0.5, 0.5])
    if not isinstance(value, list) or len(value) != 3 or not all(_is_number(one) for one in value):
        raise WeightsError(f"{folder}/{IMAGE_PROCESSOR_FILE} has {key} {value!r}, expected three numbers")
    red, green, blue = map(float, value)
    return red, green, blue


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_resampler_config(folder: Path) -> ResamplerConfig:
    """The resampler of an export.

    Raises:
        WeightsError: config.json does not describe it.
    """
    raw = _read_json(folder / "config.json")
    try:
        counts = {key: raw[f"resampler_{key}"] for key in ("num_tokens", "depth", "ffn_multiplier")}
        strange = {key: value for key, value in counts.items() if type(value) is not int}
        if strange:
            raise ValueError(f"{strange}, expected whole numbers")
        return ResamplerConfig(**counts, latent_init=LatentInit(raw["resampler_latent_init"]))
    except (KeyError, ValueError) as e:
        raise WeightsError(f"{folder}/config.json does not describe the resampler ({e!r}): export it again") from e


def processor_files(
    llm: Path, vision: Path, vocab_size: int, modalities: Mapping[str, ModalityConfig]
) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """Tokenizer files of the decoder and the image processor of the tower; only files of known names, and without
    `auto_map`, which names code of the folder.

    Args:
        llm, vision: Hugging Face folders.
        vocab_size: rows of the decoder's embedding.
        modalities: their placeholder tokens must be in the tokenizer.

    Returns:
        File name -> content; folder -> what is left out.

    Raises:
        WeightsError: tokenizer.json is missing, or is not what a run can use.
    """
    if not (llm / "tokenizer.json").is_file():
        raise WeightsError(f"{llm}/tokenizer.json is missing: the checkpoint needs the decoder's fast tokenizer")
    sources = {name: llm for name in TOKENIZER_FILES if (llm / name).is_file()} | {IMAGE_PROCESSOR_FILE: vision}
    files = {name: (folder / name).read_bytes() for name, folder in sources.items()}
    left_out: dict[str, list[str]] = {str(folder): [] for folder in (llm, vision)}
    for name in ("tokenizer_config.json", IMAGE_PROCESSOR_FILE):
        config = _read_json(sources[name] / name) if name in files else {}
        if config.pop("auto_map", None) is not None:
            files[name] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            left_out[str(sources[name])].append(f"{name}: auto_map")
        if name != IMAGE_PROCESSOR_FILE:
            _check_tokenizer_class(llm / name, config.get("tokenizer_class"))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        _check_tokenizer(llm, Path(folder), vocab_size, modalities)
    return files, left_out


def _check_tokenizer_class(file: Path, name: object) -> None:
    """A class that transformers does not have would need code of the folder."""
    kinds = [getattr(transformers, f"{name}{suffix}", None) for suffix in ("", "Fast")]  # Qwen2Tokenizer was not fast
    fast = any(isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerFast) for kind in kinds)
    if name is not None and not fast:
        raise WeightsError(
            f"{file} has tokenizer_class {name!r}, which is no fast tokenizer of transformers: give a folder with "
            "Qwen2Tokenizer or PreTrainedTokenizerFast"
        )


def _check_tokenizer(llm: Path, files: Path, vocab_size: int, modalities: Mapping[str, ModalityConfig]) -> None:
    """The files make a tokenizer that the prompt grammar and the embedding fit."""
    try:
        ids = Tokenizer.from_file(str(files / "tokenizer.json")).get_vocab(with_added_tokens=True)
        tokenizer = ChatTokenizer.from_folder(files, build_modalities(modalities))
    except Exception as e:  # tokenizers raises Exception itself
        reason = " ".join(str(e).replace(str(files), str(llm)).split()) or type(e).__name__
        raise WeightsError(f"{llm}/tokenizer.json and its configuration make no tokenizer: {reason}") from e
    highest = max((ids | tokenizer.hf.get_vocab()).items(), key=lambda item: item[1])
    if highest[1] >= vocab_size:
        raise WeightsError(
            f"{llm}/tokenizer.json gives {highest[0]!r} the id {highest[1]}, and config.json has vocab_size "
            f"{vocab_size}: they are not of one model"
        )
