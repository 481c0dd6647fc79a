"""Layers that serve where TransformerEngine does not: RMSNorm and attention in plain torch, in megatron-core's form.

Dims: s sequence, b micro-batch, t packed tokens, n heads, g key/value groups, d head dim.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in FP32 (transformers 5.23 Qwen3RMSNorm).

    megatron-core's WrappedTorchNorm refuses sequence parallelism; here the weight is marked, so that its gradient is
    summed over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> same shape and dtype."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with the constructor that megatron-core's specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for p in self.parameters():
            p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SdpaCoreAttention(MegatronModule):
    """torch.nn.functional.scaled_dot_product_attention as megatron-core's core attention, plain or packed.

    Packed (qkv_format 'thd') documents are attended one by one, which is exact: no mask is built and no document sees
    another.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d], or [t, n, d] when packed.
            key, value: [s, b, g, d], or [t, g, d] when packed.
            attention_mask: must be None; causality comes from attn_mask_type.
            packed_seq_params: document boundaries of packed input.

        Returns:
            [s, b, n * d], or [t, 1, n * d] when packed.

        Raises:
            ValueError: an explicit mask or bias was given.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("SdpaCoreAttention takes no attention mask or bias: pass None and set attn_mask_type")
        mask_type = attn_mask_type or self.attn_mask_type
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            documents = [
                self._attend(query[a:b, None], key[a:b, None], value[a:b, None], causal)
                for a, b in itertools.pairwise(bounds)
            ]
            return torch.cat(documents)
        return self._attend(query, key, value, causal)

    def _attend(self, q_sbnd: Tensor, k_sbgd: Tensor, v_sbgd: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_sbnd, k_sbgd, v_sbgd))
        grouped = k.shape[1] != q.shape[1]
        out_bnsd = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out_bnsd.permute(2, 0, 1, 3).flatten(2)
