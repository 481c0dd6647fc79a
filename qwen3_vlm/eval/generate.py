"""Greedy answers from a Megatron model, at any tensor- and pipeline-parallel layout.

All prompts of a call go through the model together, packed end to end as in training; each round appends one token to
every prompt that is not finished. There is no KV cache: serving is the exported model's job.

Legend: n prompts, t packed tokens, v vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.sample import MediaBatch, Message
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.modality.base import Modality
from qwen3_vlm.model.vlm import VLM, packed_documents
from qwen3_vlm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked: turns with sentinels, and the files that they stand for."""

    messages: list[Message]
    media: dict[str, list[bytes]]
    """Per modality, in the order of the sentinels."""


@dataclass(frozen=True, kw_only=True)
class PackedPrompts:
    """Token sequences end to end, as the model takes them."""

    input_ids: Tensor
    """[t] int64"""
    position_ids: Tensor
    """[t] int64"""
    media: dict[str, MediaBatch]
    packed_seq_params: PackedSeqParams
    last: Tensor
    """[n] int64: index of every sequence's last token."""


class GreedyGenerator:
    """Generates with one loaded model.

    Args:
        model: this rank's stage, weights loaded.
        tokenizer, modalities: of the model's checkpoint.
        topology: where this process stands; there must be one data-parallel rank.

    Raises:
        ConfigError: the world has several data-parallel ranks.
    """

    def __init__(self, model: VLM, tokenizer: ChatTokenizer, modalities: Mapping[str, Modality], topology: Topology):
        if topology.dp_size != 1:
            raise ConfigError(
                f"generation runs on one model: world size {topology.world_size} leaves {topology.dp_size} "
                f"data-parallel ranks. Start {topology.tp_size * topology.pp_size} processes, or choose parallel= to "
                "use them all."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.modalities = modalities
        self.topology = topology
        self.chat = ChatEncoder(tokenizer, modalities)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        """Answer every prompt.

        Args:
            prompts: any number; memory grows with their total length.
            max_new_tokens: tokens after which an unfinished answer is cut.

        Returns:
            Answers without the closing <|im_end|>.

        Raises:
            BadSample: a prompt's sentinels and files differ in number, or a file cannot be decoded.
        """
        sequences, positions, items = self._encode(prompts)
        stop = {self.tokenizer.im_end_id, self.tokenizer.pad_id}
        lengths = [len(s) for s in sequences]
        active = list(range(len(sequences)))
        for _ in range(max_new_tokens):
            chosen = self._pack(sequences, positions, items, active)
            tokens = self._next_tokens(chosen).tolist()
            for n, token in zip(active, tokens, strict=True):
                sequences[n].append(token)
            active = [n for n in active if sequences[n][-1] not in stop]
            if not active:
                break
        answers = [s[length:] for s, length in zip(sequences, lengths, strict=True)]
        return [self.tokenizer.decode(a[:-1] if a and a[-1] in stop else a) for a in answers]

    def logits(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Logits [length, v] FP32 of every position of every prompt, on all ranks: for comparisons, not for speed."""
        sequences, positions, items = self._encode(prompts)
        packed = self._pack(sequences, positions, items, list(range(len(sequences))))
        with torch.no_grad():
            rows = self._forward(packed, torch.arange(sum(len(s) for s in sequences), device=packed.last.device))
        return list(rows.split([len(s) for s in sequences]))

    def _encode(
        self, prompts: Sequence[Prompt]
    ) -> tuple[list[list[int]], list[dict[str, Tensor]], dict[str, list[Tensor]]]:
        """Token ids and placeholder positions of every prompt, and all media in order, per modality."""
        encoded = [
            self.chat.encode_prompt(p.messages, {name: len(files) for name, files in p.media.items()}) for p in prompts
        ]
        items = {
            name: [modality.preprocess(raw) for p in prompts for raw in p.media.get(name, [])]
            for name, modality in self.modalities.items()
        }
        return [e.input_ids.tolist() for e in encoded], [e.media_positions for e in encoded], items

    def _pack(
        self,
        sequences: list[list[int]],
        positions: list[dict[str, Tensor]],
        items: dict[str, list[Tensor]],
        active: list[int],
    ) -> PackedPrompts:
        """Lay the active sequences end to end; a last document of padding makes the length a multiple of tp."""
        device = self.topology.backend.device
        lengths = [len(sequences[n]) for n in active]
        padding = -sum(lengths) % self.topology.tp_size
        bounds = [0]
        for length in lengths + ([padding] if padding else []):
            bounds.append(bounds[-1] + length)
        ids = [token for n in active for token in sequences[n]] + [self.tokenizer.pad_id] * padding
        media = {}
        for name, modality in self.modalities.items():
            owners = [n for n in range(len(sequences)) for _ in range(len(positions[n][name]) // modality.num_tokens)]
            kept = [item for owner, item in zip(owners, items[name], strict=True) if owner in set(active)]
            empty = torch.zeros((0, *modality.media_shape), dtype=modality.media_dtype)
            media[name] = MediaBatch(
                data=(torch.stack(kept) if kept else empty).to(device),
                positions=torch.cat([positions[n][name] + start for n, start in zip(active, bounds, strict=False)]).to(
                    device
                ),
            )
        boundaries = torch.tensor(bounds, dtype=torch.int32, device=device)
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        return PackedPrompts(
            input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
            position_ids=torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)]).to(device),
            media=media,
            packed_seq_params=packed_documents(boundaries, longest),
            last=torch.tensor([b - 1 for b in bounds[1 : len(active) + 1]], device=device),
        )

    def _next_tokens(self, packed: PackedPrompts) -> Tensor:
        """[n] int64: the most likely next token of every active sequence, on all ranks."""
        return self._forward(packed, packed.last).argmax(-1)

    def _forward(self, packed: PackedPrompts, rows: Tensor) -> Tensor:
        """[rows, v] FP32 logits at the given positions, on all ranks."""

        def step(_: object, model: VLM) -> tuple[Tensor, Callable[..., Tensor]]:
            output = model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                media=packed.media,
                packed_seq_params=packed.packed_seq_params,
            )
            return output, lambda out, non_loss_data: out

        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=[self.model],
            num_microbatches=1,
            seq_length=len(packed.input_ids),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        logits = torch.empty((len(rows), self.model.vocab_size), device=rows.device)
        if self.topology.is_last_stage:
            gathered = gather_from_tensor_model_parallel_region(outputs[0][0][rows])
            logits = gathered[:, : self.model.vocab_size].float().contiguous()
        if self.topology.pp_size > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(logits, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        return logits
