"""The whole model a second time, written from DESIGN.md's words: transformers' Qwen3 and SigLIP, and a plain connector.

Nothing here calls the package. The connector takes its tensors from a checkpoint's state dict (one process), the rest
comes from the transformers models that the checkpoint was imported from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, SiglipVisionModel
from transformers.image_utils import load_image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

Turn = tuple[str, str]
"""(role, content)"""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One model, and what it answers."""

    llm: Qwen3ForCausalLM
    tower: SiglipVisionModel
    image_processor: SiglipImageProcessorPil
    """Of the tower's folder; resizes with Pillow, so that its resize is not used."""
    tokenizer: PreTrainedTokenizerFast
    connector: Mapping[str, Tensor]
    """`resampler.*` and `projector.*` of the checkpoint, without the tower's prefix; other names are ignored."""
    num_tokens: int
    pooled: bool
    feature_layer: int = -1

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Plain ChatML with the assistant's header at its end; `<image>` is start, N pads, end."""
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        media = "<|vision_start|>" + "<|image_pad|>" * self.num_tokens + "<|vision_end|>"
        return self.tokenizer.encode(
            text.replace("<image>", media) + "<|im_start|>assistant\n", add_special_tokens=False
        )

    def pixels(self, files: Sequence[str]) -> Tensor:
        """Images as transformers normalises them, resized as torchvision resizes tensors: [i, 3, H, W] FP32.

        transformers' Pillow resize differs by a level of 255 here and there (tests/unit/modality/test_image.py).
        """
        side = self.tower.config.image_size
        mode = {2: "bilinear", 3: "bicubic"}[self.image_processor.resample]
        resized = [
            F.interpolate(
                torch.tensor(np.array(load_image(file))).permute(2, 0, 1)[None],
                (side, side),
                mode=mode,
                antialias=True,
            )[0]
            for file in files
        ]
        return self.image_processor(images=resized, do_resize=False, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """[i, p, w]: after post_layernorm for layer -1, else that layer's plain output."""
        out = self.tower(pixels, output_hidden_states=True)
        return out.last_hidden_state if self.feature_layer == -1 else out.hidden_states[self.feature_layer]

    @torch.no_grad()
    def embeddings(self, features: Tensor) -> Tensor:
        """[i, p, w] features -> [i, N, h]."""
        return torch.stack([self._project(self._resample(one)) for one in features])

    @torch.no_grad()
    def logits(self, ids: Sequence[int], files: Sequence[str]) -> Tensor:
        """[n, v] logits of one document."""
        tokens = torch.tensor(ids)
        embedded = self.llm.get_input_embeddings()(tokens).clone()
        if files:
            pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            embedded[tokens == pad] = self.embeddings(self.features(self.pixels(files))).flatten(0, 1)
        return self.llm(inputs_embeds=embedded[None]).logits[0]

    def greedy(self, ids: Sequence[int], files: Sequence[str], *, max_new_tokens: int) -> list[int]:
        """The most likely tokens, one at a time, up to an end token."""
        stop = set(self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
        answer: list[int] = []
        while len(answer) < max_new_tokens and not (answer and answer[-1] in stop):
            answer.append(int(self.logits([*ids, *answer], files)[-1].argmax()))
        return answer

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.connector[f"resampler.{name}.{part}"] for part in ("weight", "bias"))
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + self.tower.config.layer_norm_eps) * weight
            + bias
        )

    def _resample(self, features: Tensor) -> Tensor:
        """[p, w] -> [N, w]."""
        latents = self.connector["resampler.latents"]
        if self.pooled:
            latents = latents + average_grid(features, self.num_tokens)
        layer = 0
        while f"resampler.layers.{layer}.ffn_norm.weight" in self.connector:
            latents = self._block(latents, features, f"layers.{layer}")
            layer += 1
        return self._norm(latents, "final_norm")

    def _block(self, latents: Tensor, features: Tensor, name: str) -> Tensor:
        attention, ffn = (f"resampler.{name}.{part}" for part in ("attention", "ffn"))
        heads = self.tower.config.num_attention_heads
        queries = self._norm(latents, f"{name}.latent_norm")
        keys = torch.cat([self._norm(features, f"{name}.feature_norm"), queries])
        q = (queries @ self.connector[f"{attention}.linear_q.weight"].T).unflatten(1, (heads, -1))
        # Rows of linear_kv: a head's keys, then its values, head by head.
        kv = (keys @ self.connector[f"{attention}.linear_kv.weight"].T).unflatten(1, (heads, 2, -1))
        scores = torch.einsum("qnd,knd->nqk", q, kv[:, :, 0]) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("nqk,knd->qnd", scores.softmax(-1), kv[:, :, 1]).flatten(1)
        latents = latents + mixed @ self.connector[f"{attention}.linear_proj.weight"].T
        inner = exact_gelu(self._norm(latents, f"{name}.ffn_norm") @ self.connector[f"{ffn}.linear_fc1.weight"].T)
        return latents + inner @ self.connector[f"{ffn}.linear_fc2.weight"].T

    def _project(self, latents: Tensor) -> Tensor:
        fc1, fc2 = (f"projector.encoder.linear_fc{n}" for n in (1, 2))
        inner = exact_gelu(F.linear(latents, self.connector[f"{fc1}.weight"], self.connector[f"{fc1}.bias"]))
        return F.linear(inner, self.connector[f"{fc2}.weight"], self.connector[f"{fc2}.bias"])


def exact_gelu(x: Tensor) -> Tensor:
    """x * Phi(x), not its tanh form."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def average_grid(features: Tensor, cells: int) -> Tensor:
    """Average a square grid of features [p, w] over `cells` cells, the most square arrangement of them, row by row.

    Cell (r, c) averages all patches that it touches: rows floor(r H / R) to ceil((r + 1) H / R), columns alike.
    """
    side = math.isqrt(features.shape[0])
    grid = features.unflatten(0, (side, side))
    rows = max(n for n in range(1, cells + 1) if cells % n == 0 and n * n <= cells)
    columns = cells // rows

    def span(index: int, parts: int) -> slice:
        return slice(index * side // parts, -(-(index + 1) * side // parts))

    return torch.stack(
        [grid[span(r, rows), span(c, columns)].mean((0, 1)) for r in range(rows) for c in range(columns)]
    )
