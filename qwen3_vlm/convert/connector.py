"""Fresh resampler and projector: tensors by checkpoint name, the same for a seed at every layout.

Linear layers start as torch.nn.Linear does (uniform within 1 / sqrt(fan_in)), norms as identity, latents normal(0,
0.02). Every tensor draws from its own generator, so that adding one changes no other.
"""

import hashlib
import math

import torch
from torch import Tensor

from qwen3_vlm.config.schema import LATENT_INIT_STD, DecoderConfig, ModalityConfig


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def connector_shapes(modality: ModalityConfig, decoder: DecoderConfig, tower: str) -> dict[str, tuple[int, ...]]:
    """Shape of every resampler and projector tensor, by checkpoint name.

    Args:
        modality: depth, N and the encoder's width w.
        decoder: gives h.
        tower: prefix of the tower in the checkpoint, e.g. "towers.image.".
    """
    w, h, k = modality.encoder.hidden_size, decoder.hidden_size, modality.resampler.num_tokens
    f = modality.resampler.ffn_multiplier * w
    shapes: dict[str, tuple[int, ...]] = {"resampler.latents": (k, w)}
    norms = ["resampler.final_norm"]
    for layer in range(modality.resampler.depth):
        block = f"resampler.layers.{layer}."
        norms += [f"{block}{name}" for name in ("feature_norm", "latent_norm", "ffn_norm")]
        shapes |= {
            f"{block}attention.linear_q.weight": (w, w),
            f"{block}attention.linear_kv.weight": (2 * w, w),
            f"{block}attention.linear_proj.weight": (w, w),
            f"{block}ffn.linear_fc1.weight": (f, w),
            f"{block}ffn.linear_fc2.weight": (w, f),
        }
    for norm in norms:
        shapes |= {f"{norm}.weight": (w,), f"{norm}.bias": (w,)}
    shapes |= {
        "projector.encoder.linear_fc1.weight": (h, w),
        "projector.encoder.linear_fc1.bias": (h,),
        "projector.encoder.linear_fc2.weight": (h, h),
        "projector.encoder.linear_fc2.bias": (h,),
    }
    return {f"{tower}{name}": shape for name, shape in shapes.items()}


def fresh_connector(
    modality: ModalityConfig, decoder: DecoderConfig, tower: str, *, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Seeded resampler and projector.

    Args:
        modality, decoder, tower: as for `connector_shapes`.
        seed: same seed, same tensors.
        dtype: dtype of the tensors; values are drawn in FP32.
    """
    shapes = connector_shapes(modality, decoder, tower)
    tensors = {}
    for name, shape in shapes.items():
        if "norm." in name:
            value = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name.endswith("latents"):
            value = torch.randn(shape, generator=_generator(seed, name)) * LATENT_INIT_STD
        else:
            fan_in = shapes[f"{name.removesuffix('bias')}weight"][1] if name.endswith("bias") else shape[1]
            value = (torch.rand(shape, generator=_generator(seed, name)) * 2 - 1) / math.sqrt(fan_in)
        tensors[name] = value.to(dtype)
    return tensors
