"""Small models, and rows for them, without any file."""

from collections.abc import Mapping

import torch

from qwen3_vlm.config.schema import (
    DecoderConfig,
    ModalityConfig,
    ParallelConfig,
    ResamplerConfig,
    SiglipEncoderConfig,
)
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.topology import Topology
from tests.cases import FP32

DECODER = DecoderConfig(
    name="test",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=270,
    max_position_embeddings=256,
)
IMAGE = ModalityConfig(
    encoder=SiglipEncoderConfig(
        image_size=16, patch_size=4, num_layers=1, hidden_size=24, ffn_hidden_size=32, num_attention_heads=2
    ),
    resampler=ResamplerConfig(num_tokens=4, depth=2),
)


def build_vlm(topology: Topology, parallel: ParallelConfig, modalities: Mapping[str, ModalityConfig]) -> VLM:
    """A VLM with megatron-core's own random start."""
    torch.manual_seed(0)
    return VLM(decoder=DECODER, modalities=modalities, parallel=parallel, precision=FP32, topology=topology)


def images(count: int, *, seed: int = 0) -> torch.Tensor:
    """[i, 3, 16, 16] uint8 noise."""
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
