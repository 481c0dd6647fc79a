"""What the data room's tests share: a small tokenizer with Qwen3's added tokens, a toy modality, rows and images."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qwen3_vlm.config.schema import ModalityConfig, ResamplerConfig, SiglipEncoderConfig
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.sample import PackedRow
from qwen3_vlm.errors import BadSample
from qwen3_vlm.modality.base import Modality, PlaceholderTokens

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
ADDED_PLAIN = ["<think>", "</think>", "<tool_call>"]
CORPUS = "system\nuser\nassistant\nWhat is in the picture? A small red cat on a blue mat. 0 1 2 3 4 5 6 7 8 9 " * 20
IMAGE_SIZE = 16
NUM_TOKENS = 4


class ToneModality(Modality):
    """One byte a sample: a second modality with nothing of an image."""

    name = "tone"
    sentinel = "<tone>"
    placeholder = PlaceholderTokens(start="<|tone_start|>", pad="<|tone_pad|>", end="<|tone_end|>")

    @property
    def media_shape(self) -> tuple[int, ...]:
        return (5,)

    @property
    def media_dtype(self) -> torch.dtype:
        return torch.float32

    def preprocess(self, raw: bytes) -> torch.Tensor:
        if len(raw) != 5:
            raise BadSample("corrupt_tone", f"{len(raw)} bytes, expected 5")
        return torch.tensor(list(raw), dtype=torch.float32)

    def to_html(self, item: torch.Tensor) -> Markup:
        return Markup("<i>{}</i>").format(item.tolist())


def make_tokenizer(folder: Path, *, without: str | None = None) -> Path:
    """A byte-level BPE like Qwen's, with its added tokens (special and plain) after the merges' vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tones = [getattr(ToneModality.placeholder, part) for part in ("start", "pad", "end")]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL + tones if t != without])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED_PLAIN])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def image_config(num_tokens: int = NUM_TOKENS) -> ModalityConfig:
    encoder = SiglipEncoderConfig(
        image_size=IMAGE_SIZE, patch_size=8, num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1
    )
    return ModalityConfig(encoder=encoder, resampler=ResamplerConfig(num_tokens=num_tokens))


def jpeg(color: int, size: tuple[int, int] = (20, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), color % 256, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def row(key: str, question: str = "<image> What?", answer: str = "A cat.", images: list[str] | None = None) -> dict:
    """A prepared row with one question and one answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": key, "messages": messages, "media": {"image": [f"{key}.jpg"] if images is None else images}}


def good_rows(count: int) -> list[dict]:
    """Rows of mixed length; every fifth without an image."""
    rows = []
    for i in range(count):
        text_only = i % 5 == 4
        question = "What is red?" if text_only else "<image> What?"
        rows.append(row(f"s{i}", question, f"A cat {i}. " + "mat " * (i % 7), [] if text_only else None))
    return rows


def read_pass(loader: RowLoader) -> list[PackedRow]:
    """All rows up to the end of the pass."""
    rows = []
    while (step := loader.next_rows()) is not None:
        rows += step
    return rows
