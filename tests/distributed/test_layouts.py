"""An imported model, tensor- and pipeline-parallel, answers as transformers does, and its parts are really cut.

Worst difference of logits (magnitude 3): TP2 2.5e-6, PP2 2.1e-6, TP4 2.5e-6, PP4 2.1e-6, TP2 x PP2 2.5e-6.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.parallel.topology import Topology
from tests.cases import LAYOUT_SPECS, Case
from tests.distributed import checks
from tests.distributed.launch import Check, Results, launch


@pytest.fixture(scope="module")
def folder_of(
    cases: dict[str, Case], topology: Topology, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A factory of folders as `checks` reads them."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "cases").symlink_to(cases["kv1_tied"].folder.parent)
        shapes = {
            n: {p: list(t.shape) for p, t in cases[n].load(ParallelConfig(), topology).model.named_parameters()}
            for n in LAYOUT_SPECS
        }
        (folder / "shapes.json").write_text(json.dumps(shapes))
        steps = {n: checks.take_steps(cases[n], ParallelConfig(), topology) for n in LAYOUT_SPECS}
        (folder / "steps.json").write_text(json.dumps(steps))
        return folder

    return make


@pytest.fixture(scope="module")
def two(folder_of: Callable[[str], Path]) -> Results:
    """One start of two processes."""
    return launch(checks.TWO_PROCESSES, num_processes=2, folder=folder_of("two"))


@pytest.fixture(scope="module")
def four(folder_of: Callable[[str], Path]) -> Results:
    """One start of four processes."""
    return launch(checks.FOUR_PROCESSES, num_processes=4, folder=folder_of("four"), timeout_s=600)


@pytest.mark.parametrize("check", checks.TWO_PROCESSES, ids=lambda check: check.__name__)
def test_two_processes(two: Results, check: Check):
    two.require(check)


@pytest.mark.full
@pytest.mark.parametrize("check", checks.FOUR_PROCESSES, ids=lambda check: check.__name__)
def test_four_processes(four: Results, check: Check):
    four.require(check)
