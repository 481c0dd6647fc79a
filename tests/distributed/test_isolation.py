"""Packed documents do not see one another on any pipeline stage, and a stage that is not told of them is found out.

The middle stages of four are the ones that megatron-core's own multimodal example leaves without boundaries.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.model.vlm import packed_documents
from qwen3_vlm.train import step
from tests.cases import Case, open_cases
from tests.distributed.checks import layout
from tests.distributed.launch import Check, Results, launch
from tests.isolation import ROWS, Boundaries, nothing, reached_documents, whole_row
from tests.stepper import Stepper

PP4, PP2, TP2_PP2 = ParallelConfig(pp=4), ParallelConfig(pp=2), ParallelConfig(tp=2, pp=2, sequence_parallel=True)


def check(folder: Path, parallel: ParallelConfig, deaf_stage: int | None, boundaries: Boundaries) -> None:
    """Isolation, with one stage that takes its boundaries from elsewhere; then the comparison has to fail."""
    with layout(parallel) as topology:
        case = open_cases(folder / "cases", ["kv1_tied"])["kv1_tied"]
        stepper = Stepper(case, topology, parallel)
        deaf = deaf_stage is not None and topology.pp_rank == deaf_stage
        with mock.patch.object(step, "packed_documents", boundaries if deaf else packed_documents):
            reached = reached_documents(stepper)
        if reached is not None:
            assert len(reached) == sum(map(len, ROWS))
            isolated = reached == {document: {document} for document in reached}
            assert isolated == (deaf_stage is None), reached


def _checks(parallel: ParallelConfig, deaf_stages: Sequence[int]) -> list[Check]:
    planted = [(stage, boundaries) for stage in deaf_stages for boundaries in (whole_row, nothing)]
    return [functools.partial(check, parallel=parallel, deaf_stage=None, boundaries=packed_documents)] + [
        functools.partial(check, parallel=parallel, deaf_stage=stage, boundaries=leak) for stage, leak in planted
    ]


TWO = _checks(PP2, [0, 1])
FOUR = [*_checks(PP4, [1, 2]), *_checks(TP2_PP2, [1])]


def _label(check: Check) -> str:
    """Its layout and its plant."""
    options = check.keywords  # type: ignore[attr-defined]
    parallel, deaf = options["parallel"], options["deaf_stage"]
    where = f"tp{parallel.tp}pp{parallel.pp}"
    return where if deaf is None else f"{where}-stage{deaf}{options['boundaries'].__name__}"


@pytest.fixture(scope="module")
def results(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """World size -> one start."""
    found = {}
    for world, checks in ((2, TWO), (4, FOUR)):
        folder = tmp_path_factory.mktemp(f"isolation_{world}")
        (folder / "cases").symlink_to(cases["kv1_tied"].folder.parent)
        found[world] = launch(checks, num_processes=world, folder=folder)
    return found


@pytest.mark.parametrize(
    ("world", "check"),
    [(2, c) for c in TWO] + [(4, c) for c in FOUR],
    ids=lambda v: str(v) if isinstance(v, int) else _label(v),
)
def test_a_document_reaches_no_other(results: dict[int, Results], world: int, check: Check):
    """Exactly, bit for bit, where boundaries reach every stage; and not where one stage lacks them."""
    results[world].require(check)
