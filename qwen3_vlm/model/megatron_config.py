"""Our configuration -> megatron-core's TransformerConfig; the only file that knows its 247 fields."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_vlm.config.schema import DecoderConfig, ParallelConfig, PrecisionConfig, ResamplerConfig, SiglipEncoderConfig
from qwen3_vlm.parallel.backend import Backend

gelu_tanh = functools.partial(F.gelu, approximate="tanh")
"""SigLIP's activation (transformers: gelu_pytorch_tanh)."""


def params_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision.params_dtype]


def _common(parallel: ParallelConfig, precision: PrecisionConfig, backend: Backend) -> dict[str, Any]:
    dtype = params_dtype(precision)
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": parallel.tp,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": False,
        "masked_softmax_fusion": False,
        # The fused bias-GELU of megatron-core is the tanh form whatever the activation: encoders must not take it.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": backend.has_te,
        "use_cpu_initialization": backend.name == "cpu",
    }


def decoder_transformer_config(
    decoder: DecoderConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    backend: Backend,
    *,
    deterministic: bool,
) -> TransformerConfig:
    """The Qwen3 decoder. Loss is summed per token and divided once by the global count of loss tokens."""
    fp8: dict[str, Any] = {}
    if precision.fp8_recipe is not None:
        backend.require_fp8(precision.fp8_recipe)
        fp8 = {
            "fp8": "e4m3" if precision.fp8_recipe == "blockwise" else "hybrid",
            "fp8_recipe": precision.fp8_recipe,
        }
        if precision.fp8_recipe == "delayed":
            fp8 |= {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
    return TransformerConfig(
        **_common(parallel, precision, backend)
        | fp8
        | {
            "num_layers": decoder.num_layers,
            "hidden_size": decoder.hidden_size,
            "ffn_hidden_size": decoder.ffn_hidden_size,
            "num_attention_heads": decoder.num_attention_heads,
            "num_query_groups": decoder.num_query_groups,
            "kv_channels": decoder.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": decoder.rms_norm_eps,
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "pipeline_model_parallel_size": parallel.pp,
            "context_parallel_size": parallel.cp,
            "sequence_parallel": parallel.sequence_parallel,
            "calculate_per_token_loss": True,
            "bias_activation_fusion": backend.has_te,
            "bias_dropout_fusion": backend.has_te,
            "apply_rope_fusion": backend.has_te,
            "cross_entropy_loss_fusion": backend.has_te,
            "cross_entropy_fusion_impl": "te" if backend.has_te else "native",
            "deterministic_mode": deterministic,
            "batch_p2p_comm": False,
        }
    )


def encoder_transformer_config(
    encoder: SiglipEncoderConfig, parallel: ParallelConfig, precision: PrecisionConfig, backend: Backend
) -> TransformerConfig:
    """A vision tower: no sequence parallelism (729 patches do not divide), one pipeline stage, never FP8."""
    return TransformerConfig(
        **_common(parallel, precision, backend)
        | {
            "num_layers": encoder.num_built_layers,
            "hidden_size": encoder.hidden_size,
            "ffn_hidden_size": encoder.ffn_hidden_size,
            "num_attention_heads": encoder.num_attention_heads,
            "normalization": "LayerNorm",
            "layernorm_epsilon": encoder.layer_norm_eps,
            "activation_func": gelu_tanh,
            "add_bias_linear": True,
            "add_qkv_bias": True,
        }
    )


def resampler_transformer_config(
    resampler: ResamplerConfig,
    encoder: SiglipEncoderConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    backend: Backend,
) -> TransformerConfig:
    """Perceiver blocks at the encoder's width; linear layers without biases (Flamingo, arXiv:2204.14198, appendix
    A.1.1).
    """
    return TransformerConfig(
        **_common(parallel, precision, backend)
        | {
            "num_layers": resampler.depth,
            "hidden_size": encoder.hidden_size,
            "ffn_hidden_size": resampler.ffn_multiplier * encoder.hidden_size,
            "num_attention_heads": encoder.num_attention_heads,
            "normalization": "LayerNorm",
            "layernorm_epsilon": encoder.layer_norm_eps,
            "activation_func": F.gelu,
            "add_bias_linear": False,
        }
    )


def projector_transformer_config(
    decoder: DecoderConfig, parallel: ParallelConfig, precision: PrecisionConfig, backend: Backend
) -> TransformerConfig:
    """Linear(width -> h), GELU, Linear(h -> h), with biases."""
    return TransformerConfig(
        **_common(parallel, precision, backend)
        | {
            "num_layers": 1,
            "hidden_size": decoder.hidden_size,
            "ffn_hidden_size": decoder.hidden_size,
            "num_attention_heads": decoder.num_attention_heads,
            "activation_func": F.gelu,
            "add_bias_linear": True,
        }
    )
