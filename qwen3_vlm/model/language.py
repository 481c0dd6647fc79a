"""The Qwen3 decoder: megatron-core's GPTModel from a layer spec."""

import math

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_vlm.config.schema import DecoderConfig
from qwen3_vlm.parallel.backend import Backend
from qwen3_vlm.parallel.topology import Topology


class Qwen3Model(GPTModel):
    """GPTModel whose loss leaves out the rows that pad the vocabulary to a multiple of tp."""

    num_padding_columns: int = 0
    """Columns of this rank's logits that stand for no token; they are this rank's last ones."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each token.

        Args:
            labels: [b, s] int64.
            logits: [s, b, v / tp].

        Returns:
            [b, s] FP32.
        """
        if self.num_padding_columns:
            logits[..., -self.num_padding_columns :] = float("-inf")
        return super().compute_language_model_loss(labels, logits)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding rounded up to a multiple of tp_size; the padding rows are never a target nor generated."""
    return math.ceil(vocab_size / tp_size) * tp_size


def build_language_model(
    decoder: DecoderConfig, config: TransformerConfig, topology: Topology, backend: Backend
) -> Qwen3Model:
    """This pipeline stage's part of the decoder.

    The embedding's output is left whole under sequence parallelism: the visual tokens are placed first, then it is
    split.
    """
    num_layers = get_num_layers_to_build(config, pp_rank=topology.pp_rank)
    padded_size = padded_vocab_size(decoder.vocab_size, topology.tp_size)
    model = Qwen3Model(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[backend.decoder_layer_spec()] * num_layers, layer_norm=backend.final_norm(rms=True)
        ),
        vocab_size=padded_size,
        max_sequence_length=decoder.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        share_embeddings_and_output_weights=decoder.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(decoder.rope_theta),
        scatter_embedding_sequence_parallel=False,
    )
    columns = padded_size // topology.tp_size
    last_column = (topology.tp_rank + 1) * columns
    model.num_padding_columns = min(max(last_column - decoder.vocab_size, 0), columns)
    return model
