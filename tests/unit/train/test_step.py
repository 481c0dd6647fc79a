"""One optimizer step: its loss is that of the assistant's tokens, however the documents lie in micro batches."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from qwen3_vlm.checkpoint import layout, sharded
from qwen3_vlm.config.schema import OptimConfig, ParallelConfig
from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.packing import collate_rows, empty_row, pack_row
from qwen3_vlm.data.sample import EncodedSample, Message, MicroBatch
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.registry import build_modalities
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.apply import build_stage
from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.batches import StepBatch, StepCounts
from qwen3_vlm.train.loss import masked_loss
from qwen3_vlm.train.optimizer import ProgressSchedule, build_optimizer
from qwen3_vlm.train.step import StepResult, train_step
from tests.cases import FP32, Case, jpeg_file
from tests.images import jpeg
from tests.reference import Reference, Turn

SEQ_LENGTH = 192
DOCUMENTS: list[tuple[list[Turn], list[int]]] = [
    (
        [
            ("system", "Be brief."),
            ("user", "<image> and <image>?"),
            ("assistant", "A cat."),
            ("user", "Both?"),
            ("assistant", "Yes."),
        ],
        [5, 6],
    ),
    ([("user", "Say a word."), ("assistant", "Word.")], []),
]
"""Turns, and seeds of their images."""


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


class OneStep:
    """A model of the case that takes one step on given rows of documents."""

    def __init__(self, case: Case, topology: Topology):
        self.topology = topology
        architecture = layout.read_architecture(case.checkpoint)
        self.modalities = build_modalities(architecture.modality)
        self.tokenizer = ChatTokenizer.from_folder(case.checkpoint / layout.PROCESSOR, self.modalities)
        self.model, self.wrapped = build_stage(
            lambda: VLM(
                decoder=architecture.model,
                modalities=architecture.modality,
                parallel=ParallelConfig(),
                precision=FP32,
                topology=topology,
            ),
            lambda stage: sharded.load_model(stage, case.checkpoint / layout.STATE),
            trainable=["image.resampler", "image.projector"],
            precision=FP32,
            device=topology.backend.device,
        )

    def document(self, turns: Sequence[Turn], seeds: Sequence[int]) -> EncodedSample:
        messages = [Message(role=role, content=content) for role, content in turns]
        tokens = ChatEncoder(self.tokenizer, self.modalities).encode_conversation(messages, {"image": len(seeds)})
        image = self.modalities["image"]
        items = [image.preprocess(jpeg(seed)) for seed in seeds]
        return EncodedSample(
            key="",
            input_ids=tokens.input_ids,
            is_target=tokens.is_target,
            media_positions=tokens.media_positions,
            media_files={},
            media={"image": torch.stack(items) if items else torch.empty((0, *image.media_shape), dtype=torch.uint8)},
        )

    def micro_batch(self, *rows: Sequence[EncodedSample]) -> MicroBatch:
        fixed = {"seq_length": SEQ_LENGTH, "pad_id": self.tokenizer.pad_id, "modalities": self.modalities}
        return collate_rows([pack_row(row, **fixed) if row else empty_row(**fixed) for row in rows])

    def take(self, *micro_batches: MicroBatch, lr: float = 1e-3) -> StepResult:
        optim = OptimConfig(lr=lr, warmup_fraction=0.0, decay="constant")
        optimizer = build_optimizer(optim, FP32, self.wrapped)
        loss_tokens = int(sum(m.loss_mask.sum() for m in micro_batches))
        samples = sum(m.num_samples for m in micro_batches)
        return train_step(
            StepBatch(micro_batches=list(micro_batches), counts=StepCounts(loss_tokens=loss_tokens, samples=samples)),
            model=self.wrapped,
            optimizer=optimizer,
            schedule=ProgressSchedule(optimizer, optim, 10),
            units=1,
            seq_length=SEQ_LENGTH,
            micro_batch_size=micro_batches[0].input_ids.numel() // SEQ_LENGTH,
            topology=self.topology,
        )


@pytest.fixture
def one_step(case: Case, topology: Topology) -> OneStep:
    return OneStep(case, topology)


def test_tokens_and_targets_are_those_made_by_hand(case: Case, one_step: OneStep, topology: Topology):
    reference = case.reference(topology)
    for turns, seeds in DOCUMENTS:
        ids, targets = hand_made(reference, turns)
        document = one_step.document(turns, seeds)
        assert document.input_ids.tolist() == ids
        assert document.is_target.tolist() == targets


@pytest.mark.parametrize("arrangement", ["packed", "micro batches", "rows of a micro batch", "beside an empty row"])
def test_loss_is_the_hand_made_one(case: Case, one_step: OneStep, topology: Topology, arrangement: str):
    """Relative to transformers; worst measured: WORST."""
    expected, count = hand_made_loss(case.reference(topology), case)
    first, second = (one_step.document(*document) for document in DOCUMENTS)
    batch = one_step.micro_batch
    micro_batches = {
        "packed": [batch([first, second])],
        "micro batches": [batch([first]), batch([second])],
        "rows of a micro batch": [batch([first], [second])],
        "beside an empty row": [batch([second, first]), batch([])],
    }[arrangement]
    assert sum(int(m.loss_mask.sum()) for m in micro_batches) == count == len("A cat.") + len("Yes.") + len("Word.") + 3
    result = one_step.take(*micro_batches)
    print("WORST", arrangement, result.loss / expected - 1, result.grad_norm)
    assert result.loss == pytest.approx(expected, rel=1e-5, abs=0)
    assert result.grad_norm == pytest.approx(_packed_grad_norm(case, topology), rel=1e-5, abs=0)


def _packed_grad_norm(case: Case, topology: Topology) -> float:
    step = OneStep(case, topology)
    norm = step.take(step.micro_batch([step.document(*document) for document in DOCUMENTS])).grad_norm
    assert norm
    return norm


def test_a_batch_without_loss_tokens_updates_nothing(one_step: OneStep):
    before = {name: p.detach().clone() for name, p in one_step.model.named_parameters()}
    result = one_step.take(one_step.micro_batch([]))
    assert result.loss is None and result.grad_norm is None
    assert all(torch.equal(p, before[name]) for name, p in one_step.model.named_parameters())


def test_a_batch_without_images_has_a_loss_and_leaves_the_connector(one_step: OneStep):
    before = {name: p.detach().clone() for name, p in one_step.model.named_parameters()}
    result = one_step.take(one_step.micro_batch([one_step.document(*DOCUMENTS[1])]))
    assert result.loss is not None and result.grad_norm == 0
    assert all(torch.equal(p, before[name]) for name, p in one_step.model.named_parameters())


def test_masked_loss_sums_what_counts():
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    total, count, report = masked_loss(losses, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert (total.item(), count.item(), report["loss_sum"].item()) == (10.0, 2, 10.0)
    assert count.dtype == torch.int32 and report["loss_sum"].dtype == torch.float64
