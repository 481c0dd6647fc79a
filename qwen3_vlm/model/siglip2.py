"""SigLIP/SigLIP2 vision tower on megatron-core's TransformerBlock, without the pooling head.

Legend: i images, c channels, H W pixels, p patches, w width.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from qwen3_vlm.config.schema import SiglipEncoderConfig
from qwen3_vlm.parallel.backend import Backend


class SiglipEncoder(MegatronModule):
    """uint8 pixels -> patch features of the tower's last layer after post_layernorm (or of layer -2 as it is).

    Args:
        encoder: sizes of the tower.
        config: the same as TransformerConfig (model.megatron_config.encoder_transformer_config).
        backend: which layers to build of.
    """

    def __init__(self, encoder: SiglipEncoderConfig, config: TransformerConfig, backend: Backend):
        super().__init__(config=config)
        dtype = config.params_dtype
        side = encoder.image_size // encoder.patch_size
        self.grid: tuple[int, ...] = (side, side)
        self.media_shape: tuple[int, ...] = (3, encoder.image_size, encoder.image_size)
        self.patch_embedding = torch.nn.Conv2d(
            3, encoder.hidden_size, kernel_size=encoder.patch_size, stride=encoder.patch_size, dtype=dtype
        )
        self.position_embedding = torch.nn.Parameter(torch.zeros(side * side, encoder.hidden_size, dtype=dtype))
        self.block = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(
                layer_specs=[backend.encoder_layer_spec()] * config.num_layers, layer_norm=backend.final_norm(rms=False)
            ),
            post_layer_norm=encoder.feature_layer == -1,
        )
        mean = torch.tensor(encoder.image_mean).view(1, 3, 1, 1)
        std = torch.tensor(encoder.image_std).view(1, 3, 1, 1)
        self.register_buffer("mean", mean * 255, persistent=False)
        self.register_buffer("std", std * 255, persistent=False)

    def forward(self, pixels_ichw: Tensor) -> Tensor:
        """[i, 3, H, W] uint8 -> [p, i, w] features, in megatron-core's sequence-first layout."""
        normalized = (pixels_ichw.float() - self.mean) / self.std
        patches_iwyx = self.patch_embedding(normalized.to(self.patch_embedding.weight.dtype))
        patches_ipw = patches_iwyx.flatten(2).transpose(1, 2) + self.position_embedding
        return self.block(hidden_states=patches_ipw.transpose(0, 1).contiguous(), attention_mask=None)
