"""The CPU's side of tests/gpu/test_gradients.py: a step in a process that sees no GPU is the step taken here."""

from pathlib import Path

import pytest

from qwen3_vlm.config.schema import PrecisionConfig
from qwen3_vlm.parallel.topology import Topology
from tests import first_step
from tests.cases import FP32, Case
from tests.first_step import FirstStep
from tests.saved import GRADIENT, relative_differences

NAME = "kv8_untied"


@pytest.fixture(scope="module")
def on_cpu(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> FirstStep:
    return first_step.take_on_cpu(cases[NAME], tmp_path_factory.mktemp("first_step") / "cpu")


def test_both_processes_take_the_same_step(
    cases: dict[str, Case], topology: Topology, on_cpu: FirstStep, tmp_path: Path
):
    """Equal bits, for every tensor that trains and no other."""
    here = first_step.take(cases[NAME], topology, FP32, tmp_path / "here")
    assert here.loss == on_cpu.loss
    assert here.gradients.keys() == on_cpu.gradients.keys()
    assert all(tensor.equal(on_cpu.gradients[name]) and tensor.any() for name, tensor in here.gradients.items())
    parts = {name.removeprefix(GRADIENT).rpartition(".layers.")[0] or name for name in here.gradients}
    assert {"language_model.decoder", "towers.image.resampler"} <= parts
    assert not any("towers.image.encoder." in name for name in here.gradients)


def test_bf16_is_within_the_bounds(cases: dict[str, Case], topology: Topology, on_cpu: FirstStep, tmp_path: Path):
    """The GPU is held to them too. Measured: loss 2.5e-4, gradients 4.0e-2 at worst (a q_layernorm), median 1.9e-2."""
    got = first_step.take(cases[NAME], topology, PrecisionConfig(), tmp_path / "here")
    assert got.loss == pytest.approx(on_cpu.loss, rel=first_step.BF16_LOSS, abs=0)
    apart = relative_differences(on_cpu.gradients, got.gradients)
    assert max(apart.values()) <= first_step.BF16_GRADIENT
