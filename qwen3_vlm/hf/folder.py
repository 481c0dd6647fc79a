"""The text files of an exported folder: everything but tensors and tokenizer. Plain values in, text out.

The folder loads with transformers' Auto classes and `trust_remote_code=True`: config.json names the classes of the
three files that travel with it (configuration, modeling and processing). Beside them lie

    model*.safetensors (+ index)    the tensors, named as below
    tokenizer.json, ...             the decoder's tokenizer files; tokenizer_config.json as `tokenizer_config` makes it

Tensors, every one in transformers' own shape, so that 4.57 and 5.x both load them:

    model.language_model.*  Qwen3Model; embed_tokens has the true vocabulary. lm_head.weight beside it, unless tied
    model.vision_tower.*    the SigLIP tower without `vision_model.` and without pooling head. Layers behind the one
                            whose output is taken are left out, and post_layernorm unless feature_layer is -1
    model.resampler.*, model.projector.*   as the checkpoint names them behind `towers.image.`; rows of a resampler's
                            linear_kv are a head's keys, then its values, head by head
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
CODE = ("configuration_qwen3_siglip.py", "modeling_qwen3_siglip.py", "processing_qwen3_siglip.py")
CHAT_TEMPLATE = "chat_template.jinja"
MODEL_CARD = "model_card.md"


@dataclass(frozen=True, kw_only=True)
class FolderSpec:
    """What the files say."""

    text_config: dict[str, Any]
    """Qwen3Config's fields."""
    vision_config: dict[str, Any]
    """SiglipVisionConfig's fields; num_hidden_layers as published, whatever feature_layer is."""
    feature_layer: int
    num_tokens: int
    depth: int
    latent_init: str
    ffn_multiplier: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    resample: int
    """Pillow's code: 3 bicubic, 2 bilinear."""
    dtype: str
    """Of the tensors: bfloat16 or float32."""
    token_ids: dict[str, int]
    """Of <|im_end|>, <|endoftext|>, <|image_pad|>, <|vision_start|>, <|vision_end|>."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the model card says; every field is one line or a Markdown block."""

    name: str
    license: str
    """SPDX name in lower case, as the Hub writes it, or "other"."""
    llm: str
    """Where the decoder's weights come from."""
    vision: str
    """Where the tower's weights come from."""
    recipe: list[str] = field(default_factory=list)
    """A line a stage: what trained, on what, for how long."""
    data: list[str] = field(default_factory=list)
    """A line a data set, with its licence."""
    checkpoint: str = ""
    """Which checkpoint this is: step, code version, configuration."""


def text_files(spec: FolderSpec, card: Card) -> dict[str, str]:
    """File name -> content, config.json last: without it no loader takes the folder for complete."""
    return {
        **{name: (HERE / name).read_text() for name in CODE},
        CHAT_TEMPLATE: chat_template(),
        "generation_config.json": generation_config(spec),
        "preprocessor_config.json": _json(_image_processor(spec)),
        "processor_config.json": _json(
            {
                "processor_class": "Qwen3SiglipProcessor",
                "auto_map": {"AutoProcessor": "processing_qwen3_siglip.Qwen3SiglipProcessor"},
                "num_image_tokens": spec.num_tokens,
            }
        ),
        "README.md": model_card(spec, card),
        "config.json": _json(_config(spec)),
    }


def chat_template() -> str:
    """Plain ChatML; the tokenizer alone can use it too."""
    return (HERE / CHAT_TEMPLATE).read_text()


def generation_config(spec: FolderSpec) -> str:
    """Greedy, and stops at the end of a turn or text."""
    ids = spec.token_ids
    return _json(
        {
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        }
    )


def tokenizer_config(text: str) -> str:
    """The decoder's tokenizer_config.json for a chat model, without its own template (which adds think blocks), and
    without auto_map: who trusts the export's code does not trust what the decoder's folder pointed to.

    What transformers 5 wrote is put in words that 4.57 knows too: a tokenizer of no class of its own is called
    PreTrainedTokenizerFast, and a list of further special tokens additional_special_tokens.
    """
    config = {key: value for key, value in json.loads(text).items() if key not in ("chat_template", "auto_map")}
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return _json(config | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"})


def model_card(spec: FolderSpec, card: Card) -> str:
    """README.md."""

    def lines(items: list[str]) -> str:
        return "\n".join(f"- {item}" for item in items) or "- not recorded"

    return Template((HERE / MODEL_CARD).read_text()).substitute(
        name=card.name,
        license=card.license,
        llm=card.llm,
        vision=card.vision,
        recipe=lines(card.recipe),
        data=lines(card.data),
        checkpoint=card.checkpoint or "not recorded",
        num_tokens=spec.num_tokens,
        image_size=spec.vision_config["image_size"],
        dtype=spec.dtype,
    )


def _config(spec: FolderSpec) -> dict[str, Any]:
    ids = spec.token_ids
    return {
        "architectures": ["Qwen3SiglipForConditionalGeneration"],
        "model_type": "qwen3_siglip_vlm",
        "auto_map": {
            "AutoConfig": "configuration_qwen3_siglip.Qwen3SiglipConfig",
            "AutoModel": "modeling_qwen3_siglip.Qwen3SiglipModel",
            "AutoModelForImageTextToText": "modeling_qwen3_siglip.Qwen3SiglipForConditionalGeneration",
            "AutoProcessor": "processing_qwen3_siglip.Qwen3SiglipProcessor",
        },
        "dtype": spec.dtype,
        "torch_dtype": spec.dtype,  # its name before transformers 4.56
        "tie_word_embeddings": spec.text_config["tie_word_embeddings"],
        "image_token_id": ids["<|image_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "feature_layer": spec.feature_layer,
        "resampler_num_tokens": spec.num_tokens,
        "resampler_depth": spec.depth,
        "resampler_latent_init": spec.latent_init,
        "resampler_ffn_multiplier": spec.ffn_multiplier,
        "text_config": {"model_type": "qwen3"} | spec.text_config,
        "vision_config": {"model_type": "siglip_vision_model"} | spec.vision_config | {"vision_use_head": False},
    }


def _image_processor(spec: FolderSpec) -> dict[str, Any]:
    size = spec.vision_config["image_size"]
    return {
        "image_processor_type": "Qwen3SiglipImageProcessor",
        "processor_class": "Qwen3SiglipProcessor",
        "auto_map": {
            "AutoImageProcessor": "processing_qwen3_siglip.Qwen3SiglipImageProcessor",
            "AutoProcessor": "processing_qwen3_siglip.Qwen3SiglipProcessor",
        },
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
        "resample": spec.resample,
        "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std),
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
