"""RMSNorm and attention of the machine without TransformerEngine."""

import itertools

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qwen3_vlm.parallel.local_layers import RMSNorm, SdpaCoreAttention
from qwen3_vlm.parallel.topology import Topology


def config(dtype: torch.dtype = torch.float32) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, params_dtype=dtype
    )


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rms_norm_equals_transformers_bit_for_bit(topology: Topology, dtype: torch.dtype):
    ours, theirs = RMSNorm(config(dtype), 32, eps=1e-5), Qwen3RMSNorm(32, eps=1e-5).to(dtype)
    weight = noise(32, seed=1).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    x = (3 * noise(5, 2, 32)).to(dtype)
    assert ours(x).dtype == dtype
    assert torch.equal(ours(x), theirs(x))


def attention(mask: AttnMaskType = AttnMaskType.causal) -> SdpaCoreAttention:
    return SdpaCoreAttention(config(), 1, mask, "self")


def packed(bounds: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """[s, n, d] queries and [s, g, d] keys, values -> [s, n * d], by the definition."""
    per_group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(per_group, 1), v.repeat_interleave(per_group, 1)
    scores = torch.einsum("snd,tnd->nst", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return torch.einsum("nst,tnd->snd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_is_the_definition(topology: Topology, causal: bool):
    """Worst difference measured: 4e-7."""
    q, k, v = noise(7, 2, 4, 8), noise(7, 2, 2, 8, seed=1), noise(7, 2, 2, 8, seed=2)
    out_sbh = attention(AttnMaskType.causal if causal else AttnMaskType.no_mask)(q, k, v)
    for b in range(2):
        torch.testing.assert_close(out_sbh[:, b], naive(q[:, b], k[:, b], v[:, b], causal=causal), atol=2e-6, rtol=0)


@pytest.mark.parametrize("bounds", [[0, 7], [0, 1, 7], [0, 3, 4, 7]])
def test_packed_documents_are_attended_one_by_one(topology: Topology, bounds: list[int]):
    q, k, v = noise(7, 4, 8), noise(7, 2, 8, seed=1), noise(7, 2, 8, seed=2)
    out = attention()(q, k, v, packed_seq_params=packed(bounds))
    assert out.shape == (7, 1, 32)
    for a, b in itertools.pairwise(bounds):
        alone = attention()(q[a:b, None], k[a:b, None], v[a:b, None])
        assert torch.equal(out[a:b], alone)


def test_masks_and_biases_are_refused(topology: Topology):
    x = noise(3, 1, 4, 8)
    for name in ("attention_mask", "attention_bias"):
        with pytest.raises(ValueError, match="takes no attention mask or bias"):
            attention()(x, x, x, **{name: torch.zeros(1)})
