"""A toy second modality next to images: registry lines and an encoder, all in this file, and nothing else changes.

"tone" is three bytes. Its encoder makes six features of them, which are pooled along their length to two tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import Markup
from megatron.core.transformer.module import MegatronModule

from qwen3_vlm.config import schema
from qwen3_vlm.config.schema import ModalityConfig, OptimConfig, ParallelConfig, PrecisionConfig, ResamplerConfig
from qwen3_vlm.config.tree import modality_from_dict, to_dict
from qwen3_vlm.convert.connector import fresh_connector
from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.packing import collate_rows, pack_row
from qwen3_vlm.data.sample import EncodedSample, Message, MicroBatch
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.base import Modality, PlaceholderTokens
from qwen3_vlm.modality.registry import MODALITIES, build_modalities
from qwen3_vlm.model import megatron_config
from qwen3_vlm.model.tower import ENCODER_BUILDERS
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.apply import build_stage
from qwen3_vlm.parallel.backend import Backend
from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.batches import StepBatch, StepCounts
from qwen3_vlm.train.optimizer import ProgressSchedule, build_optimizer
from qwen3_vlm.train.step import train_step
from tests.cases import FP32
from tests.hf_folders import write_tokenizer
from tests.images import jpeg
from tests.unit.model.builders import DECODER, IMAGE, build_vlm

SEQ_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class ToneEncoderConfig:
    """What every encoder's configuration has, and a length."""

    kind: str = "tone"
    length: int = 6
    hidden_size: int = 16
    num_attention_heads: int = 2
    layer_norm_eps: float = 1e-6


class ToneModality(Modality):
    """Three bytes a tone."""

    name = "tone"
    sentinel = "<tone>"
    placeholder = PlaceholderTokens(start="<|tone_start|>", pad="<|tone_pad|>", end="<|tone_end|>")

    @property
    def media_shape(self) -> tuple[int, ...]:
        return (3,)

    @property
    def media_dtype(self) -> torch.dtype:
        return torch.float32

    def preprocess(self, raw: bytes) -> torch.Tensor:
        return torch.tensor(list(raw), dtype=torch.float32) / 255

    def to_html(self, item: torch.Tensor) -> Markup:
        return Markup("{}").format(item.tolist())


class ToneEncoder(MegatronModule):
    """One linear layer: [i, 3] -> [length, i, w]."""

    def __init__(
        self, config: ToneEncoderConfig, parallel: ParallelConfig, precision: PrecisionConfig, backend: Backend
    ):
        resampler = ResamplerConfig()
        super().__init__(
            config=megatron_config.resampler_transformer_config(resampler, config, parallel, precision, backend)  # type: ignore[arg-type]
        )
        self.grid = (config.length,)
        self.media_shape = (3,)
        self.linear = torch.nn.Linear(3, config.length * config.hidden_size)

    def forward(self, tones: torch.Tensor) -> torch.Tensor:
        return self.linear(tones).unflatten(1, (self.grid[0], -1)).transpose(0, 1)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModalityConfig]:
    """The three registry lines, and a configuration that went through YAML's form."""
    monkeypatch.setitem(MODALITIES, "tone", ToneModality)
    monkeypatch.setitem(schema.ENCODERS, "tone", ToneEncoderConfig)
    monkeypatch.setitem(ENCODER_BUILDERS, "tone", ToneEncoder)
    tone = ModalityConfig(encoder=ToneEncoderConfig(), resampler=ResamplerConfig(num_tokens=2, depth=1))
    configs = modality_from_dict(to_dict({"image": IMAGE, "tone": tone}))
    assert configs["tone"] == tone
    return configs


@pytest.fixture
def batch(both: dict[str, ModalityConfig], tmp_path: Path) -> MicroBatch:
    """One row: a document with two images and two tones in turns, and one with a tone."""
    write_tokenizer(tmp_path, more_special=["<|tone_start|>", "<|tone_pad|>", "<|tone_end|>"])
    modalities = build_modalities(both)
    tokenizer = ChatTokenizer.from_folder(tmp_path, modalities)
    chat = ChatEncoder(tokenizer, modalities)

    def document(question: str, media: dict[str, list[bytes]]) -> EncodedSample:
        messages = [Message(role="user", content=question), Message(role="assistant", content="Yes.")]
        tokens = chat.encode_conversation(messages, {name: len(files) for name, files in media.items()})
        items = {name: [m.preprocess(raw) for raw in media.get(name, [])] for name, m in modalities.items()}
        return EncodedSample(
            key="",
            input_ids=tokens.input_ids,
            is_target=tokens.is_target,
            media_positions=tokens.media_positions,
            media_files={},
            media={
                name: torch.stack(items[name]) if items[name] else torch.empty((0, *m.media_shape), dtype=m.media_dtype)
                for name, m in modalities.items()
            },
        )

    documents = [
        document("<image><tone> or <tone><image>?", {"image": [jpeg(0), jpeg(1)], "tone": [b"abc", b"xyz"]}),
        document("A <tone>?", {"tone": [b"123"]}),
    ]
    row = pack_row(documents, seq_length=SEQ_LENGTH, pad_id=tokenizer.pad_id, modalities=modalities)
    return collate_rows([row])


@torch.no_grad()
def embed(model: VLM, batch: MicroBatch) -> torch.Tensor:
    return model._embed(batch.input_ids, batch.position_ids, batch.media).squeeze(1)


def test_another_tone_changes_its_own_rows_alone(
    topology: Topology, both: dict[str, ModalityConfig], batch: MicroBatch
):
    model = build_vlm(topology, ParallelConfig(), both).eval()
    positions = batch.media["tone"].positions
    assert len(positions) == 6 and len(batch.media["image"].positions) == 8
    before = embed(model, batch)
    batch.media["tone"].data[1] += 1
    changed = (embed(model, batch) != before).any(-1).nonzero().squeeze(1)
    assert changed.tolist() == positions[2:4].tolist()


def test_it_trains_next_to_images(topology: Topology, both: dict[str, ModalityConfig], batch: MicroBatch):
    """One step through the whole model: what trains moves, in both towers, and what is frozen does not."""
    trainable = ["tone.encoder", "tone.resampler", "tone.projector", "image.projector"]
    model, wrapped = build_stage(
        lambda: build_vlm(topology, ParallelConfig(), both),
        lambda stage: None,
        trainable=trainable,
        precision=FP32,
        device=topology.backend.device,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim = OptimConfig(lr=0.01, warmup_fraction=0.0, decay="constant")
    optimizer = build_optimizer(optim, FP32, wrapped)
    result = train_step(
        StepBatch(micro_batches=[batch], counts=StepCounts(loss_tokens=int(batch.loss_mask.sum()), samples=2)),
        model=wrapped,
        optimizer=optimizer,
        schedule=ProgressSchedule(optimizer, optim, 10),
        units=1,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        topology=topology,
    )
    assert result.loss and result.grad_norm
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    wanted = tuple(f"towers.{part}." for part in trainable)
    assert moved == {name for name in before if name.startswith(wanted)}


def test_it_has_a_fresh_connector_and_a_place_in_the_checkpoint(topology: Topology, both: dict[str, ModalityConfig]):
    model = build_vlm(topology, ParallelConfig(), both)
    state: dict[str, Any] = model.sharded_state_dict()
    names = {t.key for t in state.values() if getattr(t, "key", "").startswith("towers.tone.")}
    connector = fresh_connector(both["tone"], DECODER, "towers.tone.", seed=1, dtype=torch.float32)
    assert connector.keys() <= names
    assert {"towers.tone.encoder.linear.weight", "towers.tone.encoder.linear.bias"} <= names
