"""THE seam between CPU and GPU: chosen once at start, asked everywhere, printed with its reasons.

`select_backend()` answers which device and communication library serve, which layers the model is built of, and which
library computes each kernel. No other file asks whether CUDA is there. Import order matters: megatron.core must be
imported after it.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from qwen3_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """Which library serves one kernel, and why."""

    kernel: str
    library: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What this machine computes and communicates with."""

    name: str
    """cpu or gpu."""
    device: torch.device
    distributed: str
    """torch.distributed backend: gloo or nccl."""
    has_te: bool
    """Layers are TransformerEngine's."""
    kernels: tuple[KernelChoice, ...]

    @property
    def overlaps_communication(self) -> bool:
        """Gradients are reduced during the backward pass and weights gathered during the next forward pass: nccl runs
        beside the computation, gloo takes its processor time."""
        return self.distributed == "nccl"

    def describe(self) -> str:
        """Several lines for the log: the device, then what serves each kernel and why."""
        overlap = (
            "gradient reduction and weight gather overlap with computation"
            if self.overlaps_communication
            else f"no overlap: {self.distributed} computes on the processor that the model needs"
        )
        lines = [f"backend {self.name}: device {self.device}, {self.distributed}; {overlap}"]
        lines += [f"  {k.kernel:<14} {k.library:<18} {k.reason}" for k in self.kernels]
        return "\n".join(lines)

    def require_fp8(self, recipe: str) -> None:
        """Refuse an FP8 recipe that this machine cannot run.

        Raises:
            ConfigError: there is no GPU with TransformerEngine, or the GPU is older than compute capability 8.9.
        """
        if not self.has_te:
            raise ConfigError(
                f"precision fp8_{recipe} needs a GPU with TransformerEngine; this machine serves layers with torch on "
                f"{self.device.type}. Use precision=bf16 or precision=fp32."
            )
        capability = torch.cuda.get_device_capability()
        if capability < (8, 9):
            raise ConfigError(
                f"precision fp8_{recipe} needs compute capability 8.9 or newer, this GPU has "
                f"{capability[0]}.{capability[1]}. Use precision=bf16."
            )

    def decoder_layer_spec(self) -> Any:
        """Megatron ModuleSpec of one Qwen3 decoder layer (RMSNorm, qk-norm, causal self-attention, SwiGLU)."""
        from megatron.core.models.gpt import gpt_layer_specs

        if self.has_te:
            return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
        from qwen3_vlm.parallel.local_layers import RMSNorm, SdpaCoreAttention

        spec = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
        attention.core_attention = SdpaCoreAttention
        return spec

    def encoder_layer_spec(self) -> Any:
        """Megatron ModuleSpec of one ViT layer (LayerNorm, self-attention without mask, MLP with biases)."""
        from megatron.core.models.vision import vit_layer_specs
        from megatron.core.transformer.enums import AttnMaskType

        if self.has_te:
            return vit_layer_specs.get_vit_layer_with_transformer_engine_spec()
        from qwen3_vlm.parallel.local_layers import LayerNorm, SdpaCoreAttention

        spec = vit_layer_specs.get_vit_layer_with_local_spec()
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = LayerNorm
        spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
        spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
        # The checkpoint's names are those of the fused TransformerEngine layers, as in megatron-core's GPT spec.
        spec.submodules.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
        return spec

    def final_norm(self, *, rms: bool) -> Any:
        """Module class of a stack's last norm: RMSNorm for the decoder, LayerNorm for an encoder."""
        if self.has_te:
            from megatron.core.extensions.transformer_engine import TENorm

            return TENorm
        from qwen3_vlm.parallel.local_layers import LayerNorm, RMSNorm

        return RMSNorm if rms else LayerNorm

    def peak_memory_bytes(self) -> int | None:
        """Largest device memory allocated since start; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.name == "gpu" else None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _use_group_step_adam() -> None:
    """Give megatron-core our AdamW in the place where it looks for apex's FusedAdam (see adam.py for why)."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    from qwen3_vlm.parallel.adam import GroupStepAdamW

    megatron_optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _kernels(gpu: bool, te: bool, apex: bool) -> tuple[KernelChoice, ...]:
    if te:
        why = "TransformerEngine is installed"
        layers = adam = cross_entropy = "TransformerEngine"
        why_adam = why_cross_entropy = why
    else:
        why = "TransformerEngine is not installed" if gpu else "no GPU"
        layers, cross_entropy, why_cross_entropy = "torch", "megatron-core", f"{why}: vocab-parallel, in torch"
        adam, why_adam = (
            ("apex", "apex is installed") if gpu and apex else ("torch", f"{why}: AdamW with a step per group")
        )
    return (
        KernelChoice(kernel="norm", library=layers, reason=why),
        KernelChoice(kernel="attention", library=layers, reason=why if te else f"{why}: SDPA, one document at a time"),
        KernelChoice(kernel="adam", library=adam, reason=why_adam),
        KernelChoice(kernel="cross entropy", library=cross_entropy, reason=why_cross_entropy),
    )


@functools.cache
def select_backend() -> Backend:
    """Choose the backend of this process, once; on a machine without a GPU, prepare megatron-core for the CPU."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    te = gpu and _installed("transformer_engine")
    apex = _installed("apex.optimizers") if _installed("apex") else False
    if not gpu:
        from qwen3_vlm.parallel import cpu_cuda_api

        cpu_cuda_api.install()
    if not te and not (gpu and apex):
        _use_group_step_adam()
    return Backend(
        name="gpu" if gpu else "cpu",
        device=torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"),
        distributed="nccl" if gpu else "gloo",
        has_te=te,
        kernels=_kernels(gpu, te, apex),
    )
