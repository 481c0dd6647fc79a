"""A case's model as a folder that transformers loads: what the exporter writes, put together from the case's files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.hf import folder
from qwen3_vlm.parallel.topology import Topology
from tests.cases import Case

VISION_PREFIX = "vision_model."


def export_folder(case: Case, out: Path, topology: Topology) -> Path:
    """Write the case's decoder, tower and connector as one folder."""
    out.mkdir(parents=True)
    tensors = {}
    for name, tensor in load_file(case.folder / "llm" / "model.safetensors").items():
        tensors[
            "lm_head.weight" if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        ] = tensor
    vision = json.loads((case.folder / "tower" / "config.json").read_text())
    built = vision["num_hidden_layers"] + 1 + case.spec.feature_layer
    unbuilt = [f"encoder.layers.{i}." for i in range(built, vision["num_hidden_layers"])]
    if case.spec.feature_layer != -1:
        unbuilt.append("post_layernorm.")
    for name, tensor in load_file(case.folder / "tower" / "model.safetensors").items():
        bare = name.removeprefix(VISION_PREFIX)
        if not bare.startswith(("head.", *unbuilt)):
            tensors[f"model.vision_tower.{bare}"] = tensor
    prefix = "towers.image."
    for name, tensor in case.load(ParallelConfig(), topology).model.state_dict().items():
        bare = name.removeprefix(prefix)
        if (
            name.startswith(prefix)
            and bare.startswith(("resampler.", "projector."))
            and isinstance(tensor, torch.Tensor)
        ):
            tensors[f"model.{bare}"] = tensor.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    tokenizer = AutoTokenizer.from_pretrained(case.folder / "llm")
    shutil.copyfile(case.folder / "llm" / "tokenizer.json", out / "tokenizer.json")
    config = (case.folder / "llm" / "tokenizer_config.json").read_text()
    (out / "tokenizer_config.json").write_text(folder.tokenizer_config(config))
    spec = folder.FolderSpec(
        text_config=_text_config(case.folder / "llm"),
        vision_config={k: v for k, v in vision.items() if k in VISION_FIELDS},
        feature_layer=case.spec.feature_layer,
        num_tokens=case.spec.num_tokens,
        depth=2,
        latent_init=case.spec.latent_init,
        ffn_multiplier=4,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        resample=3,
        dtype="float32",
        token_ids={token: tokenizer.convert_tokens_to_ids(token) for token in TOKENS},
    )
    card = folder.Card(name="case", license="apache-2.0", llm="a random Qwen3", vision="a random SigLIP tower")
    for name, text in folder.text_files(spec, card).items():
        (out / name).write_text(text)
    return out


TOKENS = ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


def _text_config(llm: Path) -> dict:
    """The fields that transformers 4.57 and 5.x both read: rope_theta beside the layers, not in rope_parameters."""
    config = json.loads((llm / "config.json").read_text())
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "hidden_act",
    )
    rope = config.get("rope_parameters") or config
    return {name: config[name] for name in fields} | {"rope_theta": rope["rope_theta"], "rope_scaling": None}
