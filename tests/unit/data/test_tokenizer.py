"""ChatTokenizer: ids by name, plain text, refusals."""

from pathlib import Path

import pytest

from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.modality.base import Modality
from tests.unit.data.cases import ADDED_PLAIN, SPECIAL, make_tokenizer


def test_ids_are_looked_up(tokenizer: ChatTokenizer):
    of = tokenizer.hf.convert_tokens_to_ids
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (of("<|im_start|>"), of("<|im_end|>"))
    assert tokenizer.pad_id == of("<|endoftext|>")
    image = tokenizer.placeholder_ids["image"]
    assert [image.start, image.pad, image.end] == of(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])


@pytest.mark.parametrize(
    "text", ["A red cat", " two  spaces\n\n", "naïve 日本語 \U0001f600", "", *SPECIAL, *ADDED_PLAIN]
)
def test_words_round_trip_without_added_ids(tokenizer: ChatTokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.hf.added_tokens_decoder)
    if text not in SPECIAL + ADDED_PLAIN:
        assert ids == tokenizer.hf(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("token", ["<|im_start|>", "<|image_pad|>"])
def test_missing_token_is_named(tmp_path: Path, modalities: dict[str, Modality], token: str):
    with pytest.raises(ConfigError, match=r"lacks " + token.replace("|", r"\|")):
        ChatTokenizer.from_folder(make_tokenizer(tmp_path, without=token), modalities)


def test_folder_without_tokenizer(tmp_path: Path, modalities: dict[str, Modality]):
    with pytest.raises(ConfigError, match=r"has no tokenizer.json"):
        ChatTokenizer.from_folder(tmp_path, modalities)
