"""Small random Hugging Face folders for tests: a Qwen3, a SigLIP tower and a tokenizer with Qwen3's special tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
PLAIN_ADDED_TOKENS = ("<think>", "</think>")
# No default of transformers or of this package, and far enough from them for logits to tell.
ROPE_THETA, RMS_NORM_EPS, LAYER_NORM_EPS = 200_000.0, 1e-3, 1e-3
IMAGE_MEAN, IMAGE_STD = [0.48, 0.45, 0.41], [0.57, 0.56, 0.58]


def write_tokenizer(folder: Path, *, more_special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges (256 bytes) with the special tokens behind it, `more_special` last."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED_TOKENS])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in more_special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return fast


def randomize(model: torch.nn.Module, seed: int, std: float = 0.1) -> None:
    """Fill every parameter with seeded noise, norms around 1: no tensor is left at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)


def write_llm(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Qwen3ForCausalLM:
    """A random Qwen3 with its tokenizer; `sizes` are Qwen3Config's."""
    defaults = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": RMS_NORM_EPS,
        "tie_word_embeddings": False,
    }
    config = Qwen3Config(**(defaults | sizes))
    model = Qwen3ForCausalLM(config)
    randomize(model, seed)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder)
    return model.float().eval()


TOWER_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "image_size": 36,
    "patch_size": 8,
    "layer_norm_eps": LAYER_NORM_EPS,
}
"""16 patches; 36 is no multiple of 8, as 384 is none of 14: the last 4 rows and columns are cropped."""


def write_tower(
    folder: Path, *, seed: int = 1, dtype: torch.dtype = torch.float32, resample: int = 3, **sizes: Any
) -> SiglipVisionModel:
    """A random SigLIP vision model with its image processor; `sizes` are SiglipVisionConfig's.

    `resample` is Pillow's code: 3 bicubic, 2 bilinear.
    """
    model = SiglipVisionModel(SiglipVisionConfig(**(TOWER_SIZES | sizes)))
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, safe_serialization=True)
    _write_image_processor(folder, model.config.image_size, resample)
    return model.float().eval()


def write_siglip(folder: Path, *, seed: int = 1) -> SiglipModel:
    """A random whole SigLIP: text tower, vision tower, contrastive scale and bias."""
    text = SiglipTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config = SiglipConfig(text_config=text.to_dict(), vision_config=SiglipVisionConfig(**TOWER_SIZES).to_dict())
    model = SiglipModel(config)
    randomize(model, seed)
    model.save_pretrained(folder, safe_serialization=True)
    _write_image_processor(folder, config.vision_config.image_size)
    return model.eval()


def _write_image_processor(folder: Path, image_size: int, resample: int = 3) -> None:
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "resample": resample,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def rewrite_config(folder: Path, **values: Any) -> None:
    """Change keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def import_folders(llm: Path, vision: Path, out: Path, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """What `tools/convert.py import` does, in a process that has a topology; returns the dropped tensors by folder."""
    from qwen3_vlm.convert.architecture import architecture_of
    from qwen3_vlm.convert.hf import import_hf

    decoder, modalities = architecture_of(llm, vision, overrides)
    return import_hf(llm=llm, vision=vision, out=out, decoder=decoder, modalities=modalities, seed=7)
