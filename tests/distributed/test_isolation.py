"""Packed documents do not see one another on any pipeline stage, and a stage that is not told of them is found out.

Losses of every token come from the schedule and the forward step that training uses, forward only. The middle stages
of four are the ones that megatron-core's own multimodal example leaves without boundaries.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.data.sample import EncodedSample, MicroBatch
from qwen3_vlm.model.vlm import packed_documents
from qwen3_vlm.train import step
from tests.cases import Case, open_cases
from tests.distributed.checks import layout
from tests.distributed.launch import Check, Results, launch
from tests.reference import Turn
from tests.stepper import SEQ_LENGTH, Stepper

Boundaries = Callable[[Tensor, int], PackedSeqParams | None]
ROWS: list[list[tuple[str, int]]] = [[("a red cat", 1), ("no picture", 0), ("two of them", 2)], [("last", 1)]]
"""Rows of documents, each a word and a number of images; the last document is alone in its row."""
PP4, PP2, TP2_PP2 = ParallelConfig(pp=4), ParallelConfig(pp=2), ParallelConfig(tp=2, pp=2, sequence_parallel=True)


def _whole_row(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Every row one document."""
    ends = torch.arange(0, int(cu_seqlens[-1]) + 1, SEQ_LENGTH, dtype=torch.int32)
    return packed_documents(ends, SEQ_LENGTH)


def _nothing(cu_seqlens: Tensor, max_seqlen: int) -> None:
    """What megatron-core's example passes to middle stages."""


def _documents(stepper: Stepper, changed: int | None) -> list[list[EncodedSample]]:
    """ROWS, the changed document with other words and other images of the same length."""
    rows, number = [], 0
    for row in ROWS:
        rows.append([])
        for word, images in row:
            said, seed = (word[::-1], 50) if number == changed else (word, 10)
            turns: list[Turn] = [("user", "<image>" * images + said), ("assistant", said)]
            rows[-1].append(stepper.document(turns, [seed + 5 * number + n for n in range(images)]))
            number += 1
    return rows


def _token_losses(stepper: Stepper, batch: MicroBatch) -> Tensor | None:
    """[t] losses on the last stage, None elsewhere."""

    def forward_step(batches, model):
        output, _ = step.forward_step(batches, model)
        return output, lambda losses_1t: (losses_1t.sum(), torch.tensor(1), {"losses": losses_1t[0].clone()})

    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=[stepper.wrapped],
            num_microbatches=1,
            seq_length=batch.input_ids.numel(),
            micro_batch_size=1,
            forward_only=True,
        )
    return reports[0]["losses"] if stepper.topology.is_last_stage else None


def _reached(stepper: Stepper) -> dict[int, set[int]] | None:
    """On the last stage: document -> the documents whose losses change with it, bit for bit."""
    plain = stepper.micro_batch(*_documents(stepper, None))
    before = _token_losses(stepper, plain)
    bounds = plain.cu_seqlens.tolist()
    # Each row ends with padding, a document of its own that must not change either.
    spans = list(itertools.pairwise(bounds))
    own = [n for n, (a, _) in enumerate(spans) if _is_document(plain, a)]
    reached: dict[int, set[int]] = {}
    for number, document in enumerate(own):
        other = stepper.micro_batch(*_documents(stepper, number))
        assert other.cu_seqlens.tolist() == bounds
        after = _token_losses(stepper, other)
        if before is not None and after is not None:
            differing = {n for n, (a, b) in enumerate(spans) if not torch.equal(before[a:b], after[a:b])}
            reached[document] = differing
    return reached if before is not None else None


def _is_document(batch: MicroBatch, start: int) -> bool:
    """Padding starts with another token than a conversation."""
    return bool(batch.input_ids[start] == batch.input_ids[0])


def check(folder: Path, parallel: ParallelConfig, deaf_stage: int | None, boundaries: Boundaries) -> None:
    """Isolation, with one stage that takes its boundaries from elsewhere; then the comparison has to fail."""
    with layout(parallel) as topology:
        case = open_cases(folder / "cases", ["kv1_tied"])["kv1_tied"]
        stepper = Stepper(case, topology, parallel)
        deaf = deaf_stage is not None and topology.pp_rank == deaf_stage
        with mock.patch.object(step, "packed_documents", boundaries if deaf else packed_documents):
            reached = _reached(stepper)
        if reached is not None:
            assert len(reached) == sum(map(len, ROWS))
            isolated = reached == {document: {document} for document in reached}
            assert isolated == (deaf_stage is None), reached


def _checks(parallel: ParallelConfig, deaf_stages: Sequence[int]) -> list[Check]:
    planted = [(stage, boundaries) for stage in deaf_stages for boundaries in (_whole_row, _nothing)]
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
