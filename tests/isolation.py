"""Which packed documents a document reaches: losses of every token, while one document after the other is changed.

They come from the schedule and the forward step that training uses, forward only.
"""

import itertools
from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from qwen3_vlm.data.sample import EncodedSample, MicroBatch
from qwen3_vlm.model.vlm import packed_documents
from qwen3_vlm.train import step
from tests.reference import Turn
from tests.stepper import SEQ_LENGTH, Stepper

Boundaries = Callable[[Tensor, int], PackedSeqParams | None]
ROWS: list[list[tuple[str, int]]] = [[("a red cat", 1), ("no picture", 0), ("two of them", 2)], [("last", 1)]]
"""Rows of documents, each a word and a number of images; the last document is alone in its row."""


def whole_row(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Every row one document."""
    ends = torch.arange(0, int(cu_seqlens[-1]) + 1, SEQ_LENGTH, dtype=torch.int32, device=cu_seqlens.device)
    return packed_documents(ends, SEQ_LENGTH)


def nothing(cu_seqlens: Tensor, max_seqlen: int) -> None:
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
        one = torch.ones((), dtype=torch.int, device=output.device)
        return output, lambda losses_1t: (losses_1t.sum(), one, {"losses": losses_1t[0].clone()})

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


def reached_documents(stepper: Stepper, tolerance: float = 0.0) -> dict[int, set[int]] | None:
    """On the last stage: document -> the documents whose losses change with it, by more than the tolerance (nats)."""
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
            differing = {n for n, (a, b) in enumerate(spans) if (before[a:b] - after[a:b]).abs().max() > tolerance}
            reached[document] = differing
    return reached if before is not None else None


def _is_document(batch: MicroBatch, start: int) -> bool:
    """Padding starts with another token than a conversation."""
    return bool(batch.input_ids[start] == batch.input_ids[0])
