"""One training step on TransformerEngine in BF16 against the same step in FP32 on the CPU: the loss, every gradient.

Never run yet: written where there is no GPU. The CPU's side, and the bounds with BF16 on the CPU, are tested in
tests/parity/test_first_step.py.
"""

from pathlib import Path

import pytest

from qwen3_vlm.config.schema import PrecisionConfig
from qwen3_vlm.parallel.topology import Topology
from tests import first_step
from tests.cases import Case
from tests.saved import relative_differences


@pytest.mark.parametrize("name", ["kv1_tied", "kv8_untied"])
def test_gradients_are_the_cpus(cases: dict[str, Case], topology: Topology, tmp_path: Path, name: str):
    assert topology.backend.has_te and topology.backend.device.type == "cuda"
    expected = first_step.take_on_cpu(cases[name], tmp_path / "cpu")
    got = first_step.take(cases[name], topology, PrecisionConfig(), tmp_path / "gpu")
    assert got.loss == pytest.approx(expected.loss, rel=first_step.BF16_LOSS, abs=0)
    apart = relative_differences(expected.gradients, got.gradients)
    assert {n: d for n, d in apart.items() if not d <= first_step.BF16_GRADIENT} == {}
