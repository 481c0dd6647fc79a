"""A checkpoint and a model that differ in any tensor are told apart, in both directions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen3_vlm.checkpoint import sharded
from qwen3_vlm.config.schema import ModalityConfig, ParallelConfig
from qwen3_vlm.errors import CheckpointError
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.topology import Topology
from tests.unit.model.builders import IMAGE, build_vlm


def with_depth(depth: int) -> ModalityConfig:
    return replace(IMAGE, resampler=replace(IMAGE.resampler, depth=depth))


def model_of(topology: Topology, depth: int) -> VLM:
    return build_vlm(topology, ParallelConfig(), {"image": with_depth(depth)})


@pytest.fixture(scope="module")
def state(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with two resampler blocks."""
    folder = tmp_path_factory.mktemp("state")
    model = model_of(topology, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    sharded.save_tensors(sharded._model_state(model), folder)
    return folder


def test_every_parameter_is_filled(topology: Topology, state: Path):
    model = model_of(topology, 2)
    sharded.load_model(model, state)
    assert all(p.eq(0.5).all() for p in model.parameters())


def test_a_tensor_that_the_checkpoint_lacks_is_named(topology: Topology, state: Path):
    with pytest.raises(CheckpointError, match=r"lacks .*towers\.image\.resampler\.layers\.2\."):
        sharded.load_model(model_of(topology, 3), state)


def test_a_tensor_that_the_model_lacks_is_named(topology: Topology, state: Path):
    with pytest.raises(CheckpointError, match=r"no place for.*towers\.image\.resampler\.layers\.1\."):
        sharded.load_model(model_of(topology, 1), state)
