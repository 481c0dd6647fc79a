"""One optimizer step: its loss is that of the assistant's tokens, however the documents lie in micro batches."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.loss import masked_loss
from tests.cases import Case, jpeg_file
from tests.reference import Reference, Turn
from tests.stepper import DOCUMENTS, Stepper


def hand_made(reference: Reference, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Ids and targets, spelt out: an assistant's words and its <|im_end|>, and nothing else."""
    media = "<|vision_start|>" + "<|image_pad|>" * reference.num_tokens + "<|vision_end|>"
    ids: list[int] = []
    targets: list[bool] = []
    for role, content in turns:
        own = role == "assistant"
        for text, is_target in ((f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", own), ("\n", False)):
            tokens = reference.tokenizer.encode(text.replace("<image>", media), add_special_tokens=False)
            ids += tokens
            targets += [is_target] * len(tokens)
    return ids, targets


def hand_made_loss(reference: Reference, case: Case) -> tuple[float, int]:
    """Mean loss over all documents' assistant tokens, from transformers' logits, and their number."""
    losses = []
    for turns, seeds in DOCUMENTS:
        ids, targets = hand_made(reference, turns)
        logits = reference.logits(ids, [jpeg_file(seed, case.folder) for seed in seeds])
        nats = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        losses.append(nats[torch.tensor(targets[1:])])
    joined = torch.cat(losses)
    return joined.mean().item(), len(joined)


@pytest.fixture(scope="module")
def case(cases: dict[str, Case]) -> Case:
    return cases["kv1_untied"]


@pytest.fixture
def stepper(case: Case, topology: Topology) -> Stepper:
    return Stepper(case, topology)


def test_tokens_and_targets_are_those_made_by_hand(case: Case, stepper: Stepper):
    reference = case.reference()
    for turns, seeds in DOCUMENTS:
        ids, targets = hand_made(reference, turns)
        document = stepper.document(turns, seeds)
        assert document.input_ids.tolist() == ids
        assert document.is_target.tolist() == targets


@pytest.mark.parametrize("arrangement", ["packed", "micro batches", "rows of a micro batch", "beside an empty row"])
def test_loss_is_the_hand_made_one(case: Case, stepper: Stepper, topology: Topology, arrangement: str):
    """Relative to transformers; worst measured: 6e-8."""
    expected, count = hand_made_loss(case.reference(), case)
    first, second = (stepper.document(*document) for document in DOCUMENTS)
    batch = stepper.micro_batch
    micro_batches = {
        "packed": [batch([first, second])],
        "micro batches": [batch([first]), batch([second])],
        "rows of a micro batch": [batch([first], [second])],
        "beside an empty row": [batch([second, first]), batch([])],
    }[arrangement]
    assert sum(int(m.loss_mask.sum()) for m in micro_batches) == count == len("A cat.") + len("Yes.") + len("Word.") + 3
    result = stepper.take(*micro_batches)
    assert result.loss == pytest.approx(expected, rel=1e-5, abs=0)
    assert result.grad_norm == pytest.approx(_packed_grad_norm(case, topology), rel=1e-5, abs=0)


def _packed_grad_norm(case: Case, topology: Topology) -> float:
    step = Stepper(case, topology)
    norm = step.take(step.micro_batch([step.document(*document) for document in DOCUMENTS])).grad_norm
    assert norm
    return norm


def test_a_batch_without_loss_tokens_updates_nothing(stepper: Stepper):
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    result = stepper.take(stepper.micro_batch([]))
    assert result.loss is None and result.grad_norm is None
    assert all(torch.equal(p, before[name]) for name, p in stepper.model.named_parameters())


def test_a_batch_without_images_has_a_loss_and_leaves_the_connector(stepper: Stepper):
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    result = stepper.take(stepper.micro_batch([stepper.document(*DOCUMENTS[1])]))
    assert result.loss is not None and result.grad_norm == 0
    assert all(torch.equal(p, before[name]) for name, p in stepper.model.named_parameters())


def test_masked_loss_sums_what_counts():
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    total, count, report = masked_loss(losses, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert (total.item(), count.item(), report["loss_sum"].item()) == (10.0, 2, 10.0)
    assert count.dtype == torch.int32 and report["loss_sum"].dtype == torch.float64
