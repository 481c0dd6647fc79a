"""Perceiver resampler (Flamingo, arXiv:2204.14198): any number of features -> N latents, at the encoder's width.

Each block: cross-attention with queries LN(latents) and keys/values concat(LN(features), LN(latents)), then an FFN,
both residual and pre-norm; a last LN. With `latent_init: pooled` the latents start as learned vectors plus the feature
grid average-pooled to N cells, so that a fresh resampler already passes local content
(docs/decisions/0003-pooled-latents.md).

Legend: p features (patches), i items, w width, k = N latents.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from qwen3_vlm.config.schema import LATENT_INIT_STD, LatentInit, ResamplerConfig
from qwen3_vlm.model.sharding import ShardedModuleList
from qwen3_vlm.parallel.local_layers import LayerNorm, SdpaCoreAttention


def pooled_grid(num_tokens: int) -> tuple[int, int]:
    """Rows and columns of the N cells, as square as N's divisors allow: 9 -> (3, 3), 64 -> (8, 8), 128 -> (8, 16)."""
    rows = max(d for d in range(1, math.isqrt(num_tokens) + 1) if num_tokens % d == 0)
    return rows, num_tokens // rows


class ResamplerBlock(MegatronModule):
    """One block: cross-attention, then FFN."""

    def __init__(self, config: TransformerConfig, layer_number: int):
        super().__init__(config=config)
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.feature_norm = LayerNorm(config, width, eps)
        self.latent_norm = LayerNorm(config, width, eps)
        self.attention = CrossAttention(
            config=config,
            submodules=CrossAttentionSubmodules(
                linear_q=ColumnParallelLinear,
                linear_kv=ColumnParallelLinear,
                core_attention=SdpaCoreAttention,
                linear_proj=RowParallelLinear,
            ),
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
        )
        self.ffn_norm = LayerNorm(config, width, eps)
        self.ffn = MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))

    def forward(self, latents_kiw: Tensor, features_piw: Tensor) -> Tensor:
        """Latents [k, i, w] attend to features [p, i, w] and to themselves -> latents [k, i, w]."""
        queries = self.latent_norm(latents_kiw)
        keys = torch.cat([self.feature_norm(features_piw), queries])
        attended, _ = self.attention(queries, attention_mask=None, key_value_states=keys)
        latents_kiw = latents_kiw + attended
        update, _ = self.ffn(self.ffn_norm(latents_kiw))
        return latents_kiw + update


class Resampler(MegatronModule):
    """Features [p, i, w] -> latents [k, i, w].

    Args:
        resampler: N, depth and how latents start.
        config: the same as TransformerConfig (model.megatron_config.resampler_transformer_config).
        grid: how the p features lie: (rows, columns) for images, (length,) for one-dimensional media.
    """

    def __init__(self, resampler: ResamplerConfig, config: TransformerConfig, grid: tuple[int, ...]):
        super().__init__(config=config)
        self.num_tokens = resampler.num_tokens
        self.pooled = resampler.latent_init is LatentInit.pooled
        self.grid = grid
        latents = torch.empty(resampler.num_tokens, config.hidden_size, dtype=config.params_dtype)
        self.latents = torch.nn.Parameter(torch.nn.init.normal_(latents, std=LATENT_INIT_STD))
        self.layers = ShardedModuleList(ResamplerBlock(config, n + 1) for n in range(resampler.depth))
        self.final_norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, features_piw: Tensor) -> Tensor:
        """Resample."""
        latents_kiw = self.latents[:, None].expand(-1, features_piw.shape[1], -1)
        if self.pooled:
            latents_kiw = latents_kiw + self._pool(features_piw)
        for layer in self.layers:
            latents_kiw = layer(latents_kiw, features_piw)
        return self.final_norm(latents_kiw)

    def _pool(self, features_piw: Tensor) -> Tensor:
        """Average-pool the feature grid to N cells; adaptive, so that N may exceed p."""
        features_iwp = features_piw.permute(1, 2, 0)
        if len(self.grid) == 1:
            cells: Any = F.adaptive_avg_pool1d(features_iwp, self.num_tokens)
        else:
            cells = F.adaptive_avg_pool2d(features_iwp.unflatten(2, self.grid), pooled_grid(self.num_tokens)).flatten(2)
        return cells.permute(2, 0, 1)
