"""MLP projector (LLaVA-1.5's mlp2x_gelu): latents at the encoder's width -> embeddings of the decoder."""

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


def build_projector(config: TransformerConfig, input_size: int) -> MultimodalProjector:
    """Linear(input_size -> h), GELU, Linear(h -> h), tensor parallel.

    Args:
        config: model.megatron_config.projector_transformer_config; h is its hidden_size.
        input_size: width of the latents.
    """
    return MultimodalProjector(
        config=config,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        projector_type="mlp",
        input_size=input_size,
    )
