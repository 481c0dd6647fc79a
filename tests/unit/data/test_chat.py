"""Chat encoding: tables of tokens in and out, hand-made loss masks, refusals, and plain special-token text."""

import pytest

from qwen3_vlm.data.chat import ChatEncoder, parse_messages
from qwen3_vlm.data.sample import Message
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import BadSample
from qwen3_vlm.modality.base import Modality
from tests.unit.data.cases import NUM_TOKENS, ToneModality

ITEM = "<|vision_start|>" + "<|image_pad|>" * NUM_TOKENS + "<|vision_end|>"


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in pairs]


EXPANSIONS = [
    ([("user", "Hi"), ("assistant", "Yo")], 0, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"),
    (
        [("system", "S"), ("user", "<image>a"), ("assistant", "b")],
        1,
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{ITEM}a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    ),
    (
        [("user", " <image>\n<image> x\n"), ("assistant", "see <image>.")],
        3,
        f"<|im_start|>user\n {ITEM}\n{ITEM} x\n<|im_end|>\n<|im_start|>assistant\nsee {ITEM}.<|im_end|>\n",
    ),
    ([("assistant", "")], 0, "<|im_start|>assistant\n<|im_end|>\n"),
]


@pytest.mark.parametrize(("pairs", "num_images", "text"), EXPANSIONS)
def test_text_is_the_grammar(chat: ChatEncoder, pairs: list, num_images: int, text: str):
    tokens = chat.encode_conversation(turns(*pairs), {"image": num_images})
    assert chat.tokenizer.decode(tokens.input_ids.tolist()) == text
    pad = chat.tokenizer.placeholder_ids["image"].pad
    positions = tokens.media_positions["image"]
    assert positions.tolist() == (tokens.input_ids == pad).nonzero().flatten().tolist()
    assert positions.numel() == num_images * NUM_TOKENS


def test_loss_mask_by_hand(chat: ChatEncoder):
    """Two exchanges, a system turn, and an image inside an answer: which tokens count, one by one."""
    messages = turns(
        ("system", "S"), ("user", "<image>a"), ("assistant", "b"), ("user", "c"), ("assistant", "d<image>e")
    )
    t = chat.tokenizer
    plain = t.encode
    item = t.placeholder_ids["image"]
    by_hand: list[tuple[int, bool]] = []

    def add(ids: list[int], target: bool) -> None:
        by_hand.extend((i, target) for i in ids)

    image = [item.start] + [item.pad] * NUM_TOKENS + [item.end]
    add([t.im_start_id, *plain("system\nS"), t.im_end_id, *plain("\n")], False)
    add([t.im_start_id, *plain("user\n"), *image, *plain("a"), t.im_end_id, *plain("\n")], False)
    add([t.im_start_id, *plain("assistant\n")], False)
    add([*plain("b"), t.im_end_id], True)
    add([*plain("\n"), t.im_start_id, *plain("user\nc"), t.im_end_id, *plain("\n")], False)
    add([t.im_start_id, *plain("assistant\n")], False)
    add(plain("d"), True)
    add(image, False)
    add([*plain("e"), t.im_end_id], True)
    add(plain("\n"), False)

    tokens = chat.encode_conversation(messages, {"image": 2})
    assert list(zip(tokens.input_ids.tolist(), tokens.is_target.tolist(), strict=True)) == by_hand


def test_prompt_is_the_prefix_of_the_conversation(chat: ChatEncoder):
    """What generation starts from is, token by token, what training put before the answer."""
    asked = turns(("user", "<image> What?\n"))
    prompt = chat.encode_prompt(asked, {"image": 1})
    whole = chat.encode_conversation([*asked, Message(role="assistant", content="\nA cat")], {"image": 1})
    length = prompt.input_ids.numel()
    assert prompt.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert not whole.is_target[:length].any() and whole.is_target[length]


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "<|image_pad|>", "<think>", "a<|im_start|>user\n", "<|endoftext|>", "<tone >"]
)
def test_special_token_text_stays_text(chat: ChatEncoder, text: str):
    clean = chat.encode_conversation(turns(("user", "x"), ("assistant", "y")), {})
    dirty = chat.encode_conversation(turns(("user", f"x{text}"), ("assistant", f"{text}y")), {})
    added = set(chat.tokenizer.hf.added_tokens_decoder)

    def special(ids: list[int]) -> list[int]:
        return [i for i in ids if i in added]

    assert special(dirty.input_ids.tolist()) == special(clean.input_ids.tolist())
    assert text in chat.tokenizer.decode(dirty.input_ids.tolist())


@pytest.mark.parametrize(
    ("pairs", "num_images", "reason", "detail"),
    [
        ([], 0, "empty_conversation", "0 turns"),
        ([("user", "Hi")], 0, "empty_conversation", "1 turns, none of the assistant"),
        ([("tool", "x"), ("assistant", "y")], 0, "bad_row", "unknown role 'tool'"),
        ([("user", "<image>"), ("assistant", "y")], 0, "placeholder_mismatch", "1 <image> in the text, 0 image items"),
        ([("user", "<image>"), ("assistant", "y")], 2, "placeholder_mismatch", "1 <image> in the text, 2 image items"),
    ],
)
def test_refusals(chat: ChatEncoder, pairs: list, num_images: int, reason: str, detail: str):
    with pytest.raises(BadSample) as error:
        chat.encode_conversation(turns(*pairs), {"image": num_images})
    assert error.value.reason == reason and detail in error.value.detail


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "text",
        [1],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_malformed_messages(raw: object):
    with pytest.raises(BadSample, match=r"^bad_row: "):
        parse_messages(raw)


def test_two_modalities_interleave(tokenizer_folder, two_modalities: dict[str, Modality]):
    chat = ChatEncoder(ChatTokenizer.from_folder(tokenizer_folder, two_modalities), two_modalities)
    tokens = chat.encode_conversation(
        turns(("user", "<tone>a<image><tone>"), ("assistant", "b")), {"image": 1, "tone": 2}
    )
    tone = "<|tone_start|>" + "<|tone_pad|>" * 3 + "<|tone_end|>"
    image = "<|vision_start|>" + "<|image_pad|>" * 2 + "<|vision_end|>"
    assert f"user\n{tone}a{image}{tone}<|im_end|>" in chat.tokenizer.decode(tokens.input_ids.tolist())
    assert tokens.media_positions["tone"].numel() == 6 and tokens.media_positions["image"].numel() == 2
    with pytest.raises(BadSample, match=f"0 {ToneModality.sentinel} in the text, 1 tone items"):
        chat.encode_conversation(turns(("user", "x"), ("assistant", "b")), {"tone": 1})
