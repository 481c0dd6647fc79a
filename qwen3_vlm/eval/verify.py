"""verify: does a Hugging Face folder hold the model of a checkpoint? Files and tensors, then both sides' answers.

Flow: an export's files are compared byte for byte, and all tensors while they stream by (one rank) -> transformers'
logits in FP32 (one rank, then freed) -> the Megatron model's at the layout that was asked for (all ranks) ->
differences. Logits alone would not do: one changed value of one matrix moves them by less than rounding does.

No code of the folder is run: the classes are transformers' or this package's own. transformers reads nothing of a
folder whose files or shapes differ: its logits are then left out.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from qwen3_vlm.convert.export import Comparison, Part, compare_folder
from qwen3_vlm.convert.folders import is_export
from qwen3_vlm.data.sample import Message
from qwen3_vlm.errors import WeightsError
from qwen3_vlm.eval.generate import Prompt
from qwen3_vlm.eval.session import Session, open_session
from qwen3_vlm.hf import folder as hf_folder
from qwen3_vlm.hf.modeling_qwen3_siglip import Qwen3SiglipForConditionalGeneration
from qwen3_vlm.hf.processing_qwen3_siglip import Qwen3SiglipImageProcessor, Qwen3SiglipProcessor
from qwen3_vlm.logging import rank_from_env

TOLERANCE = 1e-4
"""Largest difference of FP32 logits that is rounding; measured 3e-6 on models with logits of magnitude 3."""

CONVERSATIONS: dict[str, list[Message]] = {
    "text": [Message(role="user", content="What is the capital of France?")],
    "one image": [Message(role="user", content="<image>\nWhat is in the picture?")],
    "three images": [
        Message(role="system", content="Be brief."),
        Message(role="user", content="Here is <image> and here is <image>."),
        Message(role="assistant", content="I see."),
        Message(role="user", content="And <image>, which differs?"),
    ],
}


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """Both sides' logits for one conversation."""

    tokens: int
    """Positions compared."""
    largest: float
    """Largest absolute difference; infinite if the two sides do not even have the same tokens."""
    cosine: float
    """Smallest cosine of the two sides' logits at a position."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared, and what differs: a name and, in words, how."""

    tolerance: float
    tensors: int
    different_tensors: list[str]
    different_files: list[str]
    logits: dict[str, LogitDifference] = field(default_factory=dict)
    """By conversation; empty if files or shapes differ."""

    @property
    def passed(self) -> bool:
        """Equal tensors, equal files, logits within the tolerance."""
        close = all(found.largest <= self.tolerance for found in self.logits.values())
        return not self.different_tensors and not self.different_files and close

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"passed": self.passed}

    def describe(self) -> list[str]:
        """For people."""
        lines = [f"{self.tensors} tensors compared bit by bit, {len(self.different_tensors)} differ"]
        lines += [f"  {name}" for name in self.different_tensors[:20]]
        lines += [f"{len(self.different_files)} files differ"] if self.different_files else []
        lines += [f"  {name}" for name in self.different_files]
        lines += [] if self.logits else ["logits were not compared, since files or shapes differ"]
        lines += [
            f"{name}: {found.tokens} positions, largest difference {found.largest:.2e}, smallest cosine "
            f"{found.cosine:.9f}"
            for name, found in self.logits.items()
        ]
        return [*lines, f"{'PASS' if self.passed else 'FAIL'} (tolerance {self.tolerance:g})"]


def verify(*, checkpoint: str, hf: Path, tolerance: float, overrides: Sequence[str]) -> Verification | None:
    """Compare a checkpoint with a folder: an export of ours, or a Qwen3 (the decoder alone).

    Args:
        checkpoint: CKPT.
        hf: the folder.
        tolerance: largest absolute difference of logits that passes.
        overrides: parallel=..., precision=... of the Megatron side; FP32 unless given.

    Returns:
        The findings, on rank 0; None on the others.

    Raises:
        CheckpointError, WeightsError, ConfigError: a side cannot be read, or the layout does not fit.
    """
    part = Part.all if is_export(hf) else Part.llm
    names = list(CONVERSATIONS) if part is Part.all else ["text"]
    media = {name: _pictures(name) for name in names}
    expected: dict[str, tuple[list[int], Tensor]] = {}
    compared = Comparison(tensors=0, files=[], misfits=[], values=[])
    is_first = rank_from_env() == 0
    if is_first:
        compared = compare_folder(checkpoint=Path(checkpoint), folder=hf, part=part)
        if not compared.files and not compared.misfits:
            expected = _transformers_logits(hf, part, media)
    with open_session(checkpoint, overrides) as session:
        found = {name: _megatron_logits(session, name, media[name]) for name in names}
        dist.barrier()
    if not is_first:
        return None
    return Verification(
        tolerance=tolerance,
        tensors=compared.tensors,
        different_tensors=compared.misfits + compared.values,
        different_files=compared.files,
        logits={name: _difference(expected[name], found[name]) for name in expected},
    )


def _pictures(name: str) -> list[bytes]:
    """PNG files of smooth noise, one for each image of a conversation, no two of one size."""
    count = sum(message.content.count("<image>") for message in CONVERSATIONS[name])
    files = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((300 + 90 * number, 200 + 40 * number)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def _transformers_logits(hf: Path, part: Part, media: Mapping[str, list[bytes]]) -> dict[str, tuple[list[int], Tensor]]:
    """Token ids, and logits [n, v] FP32, by conversation."""
    tokenizer, model = _load(hf, part)
    template = hf_folder.chat_template()
    results = {}
    if part is Part.llm:
        for name in media:
            turns = [asdict(message) for message in CONVERSATIONS[name]]
            text = tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            results[name] = _answer(model, {"input_ids": ids})
        return results
    processor = Qwen3SiglipProcessor(
        image_processor=Qwen3SiglipImageProcessor.from_pretrained(hf),
        tokenizer=tokenizer,
        chat_template=template,
        num_image_tokens=model.config.resampler_num_tokens,
    )
    for name, files in media.items():
        inputs = processor.apply_chat_template(
            [asdict(message) for message in CONVERSATIONS[name]],
            images=[Image.open(io.BytesIO(raw)) for raw in files] or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        results[name] = _answer(model, dict(inputs))
    return results


def _load(hf: Path, part: Part) -> tuple[Any, Any]:
    """Tokenizer, and model in FP32."""
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    model: torch.nn.Module
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf), local_files_only=True, trust_remote_code=False)
        if part is Part.llm:
            model = Qwen3ForCausalLM.from_pretrained(hf, **options)
        else:
            model = Qwen3SiglipForConditionalGeneration.from_pretrained(hf, **options)
    except Exception as e:  # tokenizers raises nothing narrower
        raise WeightsError(f"transformers cannot load {hf}: {e}") from e
    return tokenizer, model.eval()


@torch.no_grad()
def _answer(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[list[int], Tensor]:
    return inputs["input_ids"][0].tolist(), model(**inputs).logits[0].float()


def _megatron_logits(session: Session, name: str, files: list[bytes]) -> tuple[list[int], Tensor]:
    prompt = Prompt(messages=CONVERSATIONS[name], media={"image": files})
    encoded = session.generator.chat.encode_prompt(prompt.messages, {"image": len(files)})
    [logits] = session.generator.logits([prompt])
    return encoded.input_ids.tolist(), logits.float().cpu()


def _difference(expected: tuple[list[int], Tensor], found: tuple[list[int], Tensor]) -> LogitDifference:
    if expected[0] != found[0] or expected[1].shape != found[1].shape:
        return LogitDifference(tokens=len(found[0]), largest=float("inf"), cosine=0.0)
    a, b = expected[1].double(), found[1].double()
    largest = float((a - b).abs().nan_to_num(nan=float("inf")).max())
    return LogitDifference(
        tokens=len(found[0]), largest=largest, cosine=float(torch.cosine_similarity(a, b, dim=-1).min())
    )
