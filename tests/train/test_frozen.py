"""Frozen parts stay bit-identical and cost neither gradient buffers nor optimizer state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from qwen3_vlm.checkpoint import layout, sharded
from qwen3_vlm.config.schema import OptimConfig, ParallelConfig
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.apply import build_stage
from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.optimizer import build_optimizer
from tests.cases import FP32
from tests.train.runs import Run

TRAINED = ("towers.image.resampler.", "towers.image.projector.")
KINDS = ("exp_avg", "exp_avg_sq", "param")


def stored(checkpoint: Path) -> dict[str, Any]:
    return dist_checkpointing.load_plain_tensors(str(checkpoint / layout.STATE))


def test_frozen_tensors_are_bit_identical_after_training(topology: Topology, straight: Run, checkpoint: Path):
    before, after = stored(checkpoint), stored(layout.resolve(straight.exp_dir))
    assert before.keys() == {name for name in after if name.startswith(("language_model.", "towers."))}
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert same == {name for name in before if not name.startswith(TRAINED)}


def test_a_save_holds_optimizer_state_of_trained_parameters_alone(topology: Topology, straight: Run, checkpoint: Path):
    after = stored(layout.resolve(straight.exp_dir))
    trained = {name for name in stored(checkpoint) if name.startswith(TRAINED)}
    state = {name for name in after if name.startswith("optimizer.state.")}
    assert state == {f"optimizer.state.{kind}.{name}" for kind in KINDS for name in trained}


@pytest.mark.parametrize("trainable", [["image.projector"], ["image.resampler", "image.projector"], ["decoder"]])
def test_buffers_hold_trained_parameters_alone(topology: Topology, checkpoint: Path, trainable: list[str]):
    architecture = layout.read_architecture(checkpoint)
    model, wrapped = build_stage(
        lambda: VLM(
            decoder=architecture.model,
            modalities=architecture.modality,
            parallel=ParallelConfig(),
            precision=FP32,
            topology=topology,
        ),
        lambda stage: sharded.load_model(stage, checkpoint / layout.STATE),
        trainable=trainable,
        precision=FP32,
        device=topology.backend.device,
    )
    trained = {id(p) for name, part in model.parts().items() if name in trainable for p in part.parameters()}
    assert trained
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    buffered = [p for buffer in wrapped.buffers for p in buffer.params]
    assert {id(p) for p in buffered} == trained
    size = sum(p.numel() for p in buffered)
    # Each bucket is padded, to at most one more step of its alignment.
    assert size <= sum(buffer.numel for buffer in wrapped.buffers) <= size + 4096
    assert {id(p) for p in model.parameters() if getattr(p, "main_grad", None) is not None} == trained
    optimizer = build_optimizer(OptimConfig(lr=1e-3), FP32, wrapped)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == size
