"""The whole model on one page: embed text, run towers, place features, run the decoder.

Legend: t packed tokens, h hidden, i items, k tokens per item, v vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, ParallelConfig, PrecisionConfig
from qwen3_vlm.data.sample import MediaBatch
from qwen3_vlm.model import megatron_config
from qwen3_vlm.model.language import build_language_model
from qwen3_vlm.model.sharding import ShardedModuleDict, sharded_children
from qwen3_vlm.model.tower import ModalityTower
from qwen3_vlm.parallel.topology import Topology


def place(embeddings_t1h: Tensor, features_fh: Tensor, positions_f: Tensor) -> Tensor:
    """Put feature f into row positions_f[f] of the embeddings; every other row stays.

    An empty placement still ties the features into the graph, so that a batch without media back-propagates zeros
    through the tower instead of leaving it out.

    Raises:
        ValueError: the batch records another number of positions than the tower yields.
    """
    if features_fh.shape[0] != positions_f.shape[0]:
        raise ValueError(
            f"the batch records {positions_f.shape[0]} placeholder positions but the tower yields "
            f"{features_fh.shape[0]} embeddings: resampler.num_tokens of data and model differ"
        )
    rows_th = embeddings_t1h.squeeze(1)
    return rows_th.index_copy(0, positions_f, features_fh.to(rows_th.dtype)).unsqueeze(1)


def packed_documents(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Document boundaries [d + 1] int32 and the longest document, as attention takes them."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


class VLM(MegatronModule):
    """One pipeline stage of the vision-language model; the towers stand on the first.

    Args:
        decoder: sizes of the language model.
        modalities: name -> encoder, resampler, projector.
        parallel, precision: how the parts are cut and computed.
        topology: where this process stands.
        deterministic: ask for deterministic kernels.
    """

    def __init__(
        self,
        *,
        decoder: DecoderConfig,
        modalities: Mapping[str, ModalityConfig],
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        topology: Topology,
        deterministic: bool = False,
    ):
        backend = topology.backend
        config = megatron_config.decoder_transformer_config(
            decoder, parallel, precision, backend, deterministic=deterministic
        )
        super().__init__(config=config)
        # The four attributes below are read by megatron-core's schedules and gradient finalisation.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = topology.is_first_stage
        self.post_process = topology.is_last_stage
        self.share_embeddings_and_output_weights = decoder.tie_word_embeddings
        self.vocab_size = decoder.vocab_size
        self.language_model = build_language_model(decoder, config, topology, backend)
        self.towers = ShardedModuleDict(
            {
                name: ModalityTower(modality, decoder, parallel, precision, backend)
                for name, modality in modalities.items()
                if topology.is_first_stage
            }
        )

    def parts(self) -> dict[str, torch.nn.Module]:
        """The parts that training freezes or trains: decoder and <modality>.{encoder,resampler,projector} of this
        stage.
        """
        parts: dict[str, torch.nn.Module] = {"decoder": self.language_model}
        for name, tower in self.towers.items():
            parts |= {f"{name}.{part}": getattr(tower, part) for part in ("encoder", "resampler", "projector")}
        return parts

    def forward(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        media: Mapping[str, MediaBatch],
        packed_seq_params: PackedSeqParams,
        labels: Tensor | None = None,
    ) -> Tensor:
        """One micro batch through this stage.

        Args:
            input_ids: [t] int64, placeholders included.
            position_ids: [t] int64, restarting in each document.
            media: per modality, items and their placeholder positions.
            packed_seq_params: document boundaries; every pipeline stage needs them.
            labels: [t] int64, or None for logits.

        Returns:
            Last stage: losses [1, t] FP32, or logits [1, t, v / tp] without labels. Other stages: hidden states [t, 1,
            h] (t / tp under sequence parallelism).
        """
        decoder_input = self._embed(input_ids, position_ids, media) if self.pre_process else None
        return self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=None if labels is None else labels[None],
            packed_seq_params=packed_seq_params,
        )

    def _embed(self, input_ids: Tensor, position_ids: Tensor, media: Mapping[str, MediaBatch]) -> Tensor:
        embeddings_t1h = self.language_model.embedding(input_ids=input_ids[None], position_ids=position_ids[None])
        for name, tower in self.towers.items():
            embeddings_t1h = place(embeddings_t1h, tower(media[name].data), media[name].positions)
        if self.config.sequence_parallel:
            embeddings_t1h = scatter_to_sequence_parallel_region(embeddings_t1h)
        return embeddings_t1h

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the previous stage's output (called by megatron-core's schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied embedding on stages that hold it (called by megatron-core's gradient finalisation)."""
        return self.language_model.shared_embedding_or_output_weight()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What megatron-core's distributed checkpoint saves: all parts, at any layout under the same names."""
        return sharded_children(self, prefix, sharded_offsets, metadata)
