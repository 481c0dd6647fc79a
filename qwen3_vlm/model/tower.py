"""Encoder -> resampler -> projector, for any modality."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, ParallelConfig, PrecisionConfig
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.model import megatron_config
from qwen3_vlm.model.projector import build_projector
from qwen3_vlm.model.resampler import Resampler
from qwen3_vlm.model.siglip2 import SiglipEncoder
from qwen3_vlm.parallel.backend import Backend


def build_siglip(encoder: Any, parallel: ParallelConfig, precision: PrecisionConfig, backend: Backend) -> SiglipEncoder:
    """A SigLIP tower from its part of the configuration."""
    config = megatron_config.encoder_transformer_config(encoder, parallel, precision, backend)
    return SiglipEncoder(encoder, config, backend)


EncoderBuilder = Callable[[Any, ParallelConfig, PrecisionConfig, Backend], MegatronModule]
ENCODER_BUILDERS: dict[str, EncoderBuilder] = {"siglip": build_siglip}
"""encoder kind -> builder. An encoder maps [i, *media_shape] to features [p, i, w] and has `grid` and `media_shape`."""


class ModalityTower(MegatronModule):
    """Media of one modality -> embeddings for its placeholder positions.

    Args:
        modality: encoder, resampler and projector configuration.
        decoder: gives h.
        parallel, precision, backend: how the parts are built.

    Raises:
        ConfigError: the encoder kind is unknown.
    """

    def __init__(
        self,
        modality: ModalityConfig,
        decoder: DecoderConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        backend: Backend,
    ):
        kind = modality.encoder.kind
        if kind not in ENCODER_BUILDERS:
            raise ConfigError(f"encoder kind {kind!r} is unknown; known kinds: {', '.join(sorted(ENCODER_BUILDERS))}")
        projector_config = megatron_config.projector_transformer_config(decoder, parallel, precision, backend)
        super().__init__(config=projector_config)
        self.encoder = ENCODER_BUILDERS[kind](modality.encoder, parallel, precision, backend)
        resampler_config = megatron_config.resampler_transformer_config(
            modality.resampler, modality.encoder, parallel, precision, backend
        )
        self.resampler = Resampler(modality.resampler, resampler_config, self.encoder.grid)
        self.projector = build_projector(projector_config, resampler_config.hidden_size)

    def forward(self, media: Tensor) -> Tensor:
        """Encode.

        Args:
            media: [i, *media_shape]; i = 0 is allowed. An empty batch runs one blank item whose output is dropped, so
                that every trainable parameter takes part in every backward pass and every rank enters the same
                collectives.

        Returns:
            [i * k, h] embeddings, item by item.
        """
        num_items = media.shape[0]
        if num_items == 0:
            media = media.new_zeros((1, *self.encoder.media_shape))
        frozen = not any(p.requires_grad for p in self.encoder.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            features_piw = self.encoder(media)
        embeddings_kih = self.projector(self.resampler(features_piw))
        embeddings_ikh = embeddings_kih.transpose(0, 1)[:num_items]
        return embeddings_ikh.reshape(-1, embeddings_ikh.shape[-1])
