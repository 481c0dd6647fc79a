"""The text files of an exported folder."""

import json
from dataclasses import replace

import pytest

from qwen3_vlm.hf import folder

SPEC = folder.FolderSpec(
    text_config={"hidden_size": 64, "tie_word_embeddings": True},
    vision_config={"image_size": 36, "vision_use_head": True},
    feature_layer=-2,
    num_tokens=9,
    depth=2,
    latent_init="learned",
    ffn_multiplier=3,
    image_mean=(0.1, 0.2, 0.3),
    image_std=(0.4, 0.5, 0.6),
    resample=2,
    dtype="bfloat16",
    token_ids={
        "<|im_end|>": 11,
        "<|endoftext|>": 12,
        "<|image_pad|>": 13,
        "<|vision_start|>": 14,
        "<|vision_end|>": 15,
    },
)
CARD = folder.Card(
    name="a-model",
    license="apache-2.0",
    llm="Qwen/Qwen3-0.6B-Base",
    vision="google/siglip2-base",
    recipe=["stage 1: projector", "stage 2: $5 of LoRA"],
    data=["LLaVA-Pretrain (its licence)"],
    checkpoint="step 20",
)


def test_configuration_says_what_the_model_is():
    files = folder.text_files(SPEC, CARD)
    assert list(files)[-1] == "config.json"
    config = json.loads(files["config.json"])
    assert (config["feature_layer"], config["resampler_num_tokens"], config["resampler_depth"]) == (-2, 9, 2)
    assert (config["resampler_latent_init"], config["resampler_ffn_multiplier"]) == ("learned", 3)
    assert config["tie_word_embeddings"] and config["dtype"] == "bfloat16"
    ids = [config[f"{name}_token_id"] for name in ("image", "vision_start", "vision_end", "eos", "pad")]
    assert ids == [13, 14, 15, 11, 12]
    assert config["vision_config"]["vision_use_head"] is False
    assert all(name.split(".")[0] + ".py" in files for name in config["auto_map"].values())
    image = json.loads(files["preprocessor_config.json"])
    assert (image["resample"], image["size"]) == (2, {"height": 36, "width": 36})
    assert (image["image_mean"], image["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert json.loads(files["processor_config.json"])["num_image_tokens"] == 9
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [11, 12]


def test_the_card_holds_every_field():
    text = folder.text_files(SPEC, CARD)["README.md"]
    for words in (
        "a-model",
        "apache-2.0",
        CARD.llm,
        CARD.vision,
        *CARD.recipe,
        *CARD.data,
        "step 20",
        "9\ntokens",
        "36",
    ):
        assert words in text, words
    assert text.startswith("---\nlibrary_name: transformers\n")
    bare = replace(CARD, recipe=[], data=[], checkpoint="")
    assert folder.text_files(SPEC, bare)["README.md"].count("not recorded") == 3


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"chat_template": "<think>", "tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer_class": "Qwen2Tokenizer"}),
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"auto_map": {"AutoTokenizer": ["a--b.C", None]}}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": ["<|box|>"]},
            {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|box|>"]},
        ),
        (
            {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"box": "<|box|>"}},
            {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"box": "<|box|>"}},
        ),
    ],
)
def test_tokenizer_config_is_readable_by_both_versions(theirs: dict, ours: dict):
    added = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    assert json.loads(folder.tokenizer_config(json.dumps(theirs))) == ours | added
