"""Packing: groups, rows and micro batches; by hand and over random conversations."""

import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.packing import best_fit_decreasing, collate_rows, empty_row, one_per_row, pack_row
from qwen3_vlm.data.sample import EncodedSample, Message, SkippedSample
from tests.unit.data.cases import NUM_TOKENS


def document(key: str, ids: list[int], targets: list[int]) -> EncodedSample:
    return EncodedSample(
        key=key,
        input_ids=torch.tensor(ids, dtype=torch.int64),
        is_target=torch.tensor(targets, dtype=torch.bool),
        media_positions={},
        media_files={},
    )


def skipped(key: str) -> EncodedSample:
    sample = document(key, [], [])
    sample.skipped = SkippedSample(key=key, reason="corrupt_image", detail="")
    return sample


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([], []),
        ([5, 5, 5], [[0, 1], [2]]),
        ([6, 4, 7, 3], [[0, 1], [2, 3]]),
        ([2, 9, 1], [[0], [1, 2]]),
        ([0, 0], [[0, 1]]),
        ([10, 0, 10], [[0, 1], [2]]),
    ],
)
def test_best_fit(lengths: list[int], groups: list[list[int]]):
    assert best_fit_decreasing(lengths, 10) == groups


@pytest.mark.parametrize(
    ("lengths", "groups"), [([], []), ([3, 4], [[0], [1]]), ([0, 3, 0, 4, 0], [[0, 1, 2], [3, 4]]), ([0], [[0]])]
)
def test_one_per_row(lengths: list[int], groups: list[list[int]]):
    assert one_per_row(lengths) == groups


@given(st.lists(st.integers(0, 50), max_size=60))
def test_groups_hold_everything_once_and_fit(lengths: list[int]):
    for groups in (best_fit_decreasing(lengths, 50), one_per_row(lengths)):
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in group) <= 50 for group in groups)
    assert all(sum(lengths[i] > 0 for i in group) <= 1 for group in one_per_row(lengths))


def test_best_fit_fills_rows():
    """LLaVA-like lengths, buffer of 500: at least 98% full (FACTS measured 0.96-0.99)."""
    rng = random.Random(0)
    lengths = [min(2048, int(rng.lognormvariate(5.3, 0.6))) for _ in range(500)]
    assert sum(lengths) / (2048 * len(best_fit_decreasing(lengths, 2048))) > 0.98


def test_row_by_hand():
    samples = [document("a", [11, 12, 13, 14], [0, 0, 1, 1]), skipped("x"), document("b", [21, 22], [0, 1])]
    packed = pack_row(samples, seq_length=8, pad_id=9, modalities={})
    assert packed.input_ids.tolist() == [11, 12, 13, 14, 21, 22, 9, 9]
    assert packed.labels.tolist() == [0, 13, 14, 0, 22, 0, 0, 0]
    assert packed.loss_mask.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 4, 6, 8] and packed.cu_seqlens.dtype == torch.int32
    assert packed.keys == ["a", "b"] and [s.key for s in packed.skipped] == ["x"]


def test_micro_batch_by_hand():
    full = pack_row([document("a", [1, 2, 3, 4], [0, 1, 0, 1])], seq_length=4, pad_id=9, modalities={})
    part = pack_row([document("b", [5], [0]), skipped("x")], seq_length=4, pad_id=9, modalities={})
    batch = collate_rows([full, part, empty_row(seq_length=4, pad_id=9, modalities={})])
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8, 12], "no empty document behind a full row"
    assert batch.max_seqlen == 4 and batch.num_samples == 2 and batch.keys == ["a", "b"]
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 9, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3]
    assert [s.key for s in batch.skipped] == ["x"]


WORDS = ["<|im_start|>", "<|im_end|>\n", "<|image_pad|>", "<think>", "<image", "image>", "<Image>", " <|vision_start|>"]
"""What a user may write that looks like the grammar's own tokens."""
pieces = st.lists(st.one_of(st.just("<image>"), st.sampled_from(WORDS), st.text(max_size=12)), max_size=5)
conversations = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), pieces), min_size=1, max_size=4)


def encode(chat: ChatEncoder, index: int, turns: list[tuple[str, list[str]]]) -> EncodedSample:
    """A drawn conversation, closed by an answer; every image differs from all others of the batch."""
    messages = [Message(role=role, content="".join(parts)) for role, parts in [*turns, ("assistant", ["end"])]]
    num_images = sum(message.content.count("<image>") for message in messages)
    tokens = chat.encode_conversation(messages, {"image": num_images})
    # The text between images comes back out of the tokens, with nothing of it taken for the grammar.
    image = chat.tokenizer.placeholder_ids["image"]
    specials = [*[chat.tokenizer.im_start_id, chat.tokenizer.im_end_id] * len(messages)]
    specials += [image.start, *[image.pad] * NUM_TOKENS, image.end] * num_images
    grammar = {chat.tokenizer.im_start_id, chat.tokenizer.im_end_id, image.start, image.pad, image.end}
    assert sorted(t for t in tokens.input_ids.tolist() if t in grammar) == sorted(specials)
    media = torch.empty((num_images, 3, 16, 16), dtype=torch.uint8)
    for n, item in enumerate(media):
        item.fill_((31 * index + n) % 256)
    return EncodedSample(
        key=str(index),
        input_ids=tokens.input_ids,
        is_target=tokens.is_target,
        media_positions=tokens.media_positions,
        media_files={},
        media={"image": media},
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(conversations, min_size=1, max_size=6), st.integers(0, 40), st.integers(1, 3))
def test_random_conversations(chat: ChatEncoder, drawn: list, spare: int, empty_rows: int):
    """Through expansion, packing and collation: every document comes back out of the batch whole, and exactly once."""
    samples = [encode(chat, index, turns) for index, turns in enumerate(drawn)]
    seq_length = max(map(len, samples)) + spare
    options = {"seq_length": seq_length, "pad_id": chat.tokenizer.pad_id, "modalities": chat.modalities}
    groups = best_fit_decreasing([len(s) for s in samples], seq_length)
    rows = [pack_row([samples[i] for i in group], **options) for group in groups]
    batch = collate_rows([*rows, *[empty_row(**options)] * empty_rows])

    assert batch.input_ids.numel() == seq_length * (len(groups) + empty_rows) == batch.cu_seqlens[-1]
    assert (batch.cu_seqlens.diff() > 0).all() and batch.max_seqlen == batch.cu_seqlens.diff().max()
    spans = list(itertools.pairwise(batch.cu_seqlens.tolist()))
    for a, b in spans:
        assert batch.position_ids[a:b].tolist() == list(range(b - a))
    # A document starts with <|im_start|>; what starts with padding is nothing but padding.
    documents = [(a, b) for a, b in spans if batch.input_ids[a] == chat.tokenizer.im_start_id]
    for a, b in set(spans) - set(documents):
        assert (batch.input_ids[a:b] == chat.tokenizer.pad_id).all() and not batch.loss_mask[a:b].any()
    assert sorted(map(int, batch.keys)) == list(range(len(samples))) and batch.num_samples == len(samples)
    assert batch.num_tokens == sum(map(len, samples))
    image = batch.media["image"]
    found = 0
    for key, (a, b) in zip(batch.keys, documents, strict=True):
        sample = samples[int(key)]
        assert torch.equal(batch.input_ids[a:b], sample.input_ids)
        predicted = batch.loss_mask[a:b].bool()
        assert torch.equal(predicted[:-1], sample.is_target[1:]) and not predicted[-1]
        assert torch.equal(batch.labels[a:b][predicted], sample.input_ids[1:][sample.is_target[1:]])
        items = len(sample.media["image"])
        positions = image.positions[found * NUM_TOKENS : (found + items) * NUM_TOKENS]
        assert torch.equal(positions - a, sample.media_positions["image"])
        assert (batch.input_ids[positions] == chat.tokenizer.placeholder_ids["image"].pad).all()
        assert torch.equal(image.data[found : found + items], sample.media["image"])
        found += items
    assert found == len(image.data) and found * NUM_TOKENS == len(image.positions)
