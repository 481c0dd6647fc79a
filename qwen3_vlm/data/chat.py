"""Messages -> token ids, loss targets and placeholder positions; one code path for training and for prompts.

The grammar is plain ChatML, `<|im_start|>{role}\\n{content}<|im_end|>\\n` for each turn: no think block, a system turn
only if given. The k-th sentinel of a modality is its k-th item and becomes start + k x pad + end. An example with two
placeholder positions an item (S, P, E: vision start, pad and end; loss targets underlined):

    user:      "<image> What?"    <|im_start|> user \\n S P P E ' What' ? <|im_end|> \\n
    assistant: "A cat."           <|im_start|> assistant \\n A ' cat' . <|im_end|> \\n
                                                            ------------------
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qwen3_vlm.data.sample import Message
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import BadSample
from qwen3_vlm.modality.base import Modality

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class ChatTokens:
    """A conversation in tokens."""

    input_ids: torch.Tensor
    """[n] int64"""
    is_target: torch.Tensor
    """[n] bool: assistant content and its closing <|im_end|>; never media, headers or other turns."""
    media_positions: dict[str, torch.Tensor]
    """Per modality [i * k] int64: index of every pad token, item by item."""


@dataclass(frozen=True)
class _Text:
    """Words, encoded together with their neighbours of the same loss."""

    text: str
    is_target: bool


@dataclass(frozen=True)
class _Special:
    """A special token."""

    token_id: int
    is_target: bool = False


@dataclass(frozen=True)
class _Item:
    """One media item."""

    modality: str


class ChatEncoder:
    """Encodes conversations for one tokenizer and one set of modalities.

    Args:
        tokenizer: has the ids of the grammar's special tokens.
        modalities: whose sentinels are expanded.
    """

    def __init__(self, tokenizer: ChatTokenizer, modalities: Mapping[str, Modality]):
        self.tokenizer = tokenizer
        self.modalities = modalities
        self._owner = {modality.sentinel: name for name, modality in modalities.items()}
        sentinels = sorted(self._owner, key=len, reverse=True)  # longest first: one may be the start of another
        self._split = re.compile("(" + "|".join(map(re.escape, sentinels)) + ")") if sentinels else re.compile("(?!)")

    def encode_conversation(self, messages: Sequence[Message], num_items: Mapping[str, int]) -> ChatTokens:
        """Encode a whole conversation, as it is trained on.

        Args:
            messages: the turns.
            num_items: media items that the sample brings, per modality; a missing one is 0.

        Raises:
            BadSample: empty_conversation (no turn, or none of the assistant), bad_row (unknown role), or
                placeholder_mismatch (sentinels and items differ in number).
        """
        if not any(message.role == "assistant" for message in messages):
            raise BadSample("empty_conversation", f"{len(messages)} turns, none of the assistant")
        return self._encode(self._pieces(messages, num_items))

    def encode_prompt(self, messages: Sequence[Message], num_items: Mapping[str, int]) -> ChatTokens:
        """Encode turns followed by the assistant's header `<|im_start|>assistant\\n`: the model answers from there.

        Raises:
            BadSample: empty_conversation (no turn), bad_row or placeholder_mismatch, as in `encode_conversation`.
        """
        if not messages:
            raise BadSample("empty_conversation", "0 turns")
        header: list[_Text | _Special | _Item] = [_Special(self.tokenizer.im_start_id), _Text("assistant\n", False)]
        return self._encode(self._pieces(messages, num_items) + header)

    def _pieces(self, messages: Sequence[Message], num_items: Mapping[str, int]) -> list[_Text | _Special | _Item]:
        pieces: list[_Text | _Special | _Item] = []
        for message in messages:
            if message.role not in ROLES:
                raise BadSample("bad_row", f"unknown role {message.role!r}, expected one of {', '.join(ROLES)}")
            is_target = message.role == "assistant"
            pieces += [_Special(self.tokenizer.im_start_id), _Text(message.role + "\n", False)]
            for part in self._split.split(message.content):
                pieces.append(_Item(self._owner[part]) if part in self._owner else _Text(part, is_target))
            pieces += [_Special(self.tokenizer.im_end_id, is_target), _Text("\n", False)]
        self._check_counts(pieces, num_items)
        return pieces

    def _check_counts(self, pieces: Sequence[_Text | _Special | _Item], num_items: Mapping[str, int]) -> None:
        for name, modality in self.modalities.items():
            sentinels = sum(piece == _Item(name) for piece in pieces)
            if sentinels != num_items.get(name, 0):
                raise BadSample(
                    "placeholder_mismatch",
                    f"{sentinels} {modality.sentinel} in the text, {num_items.get(name, 0)} {name} items in the sample",
                )

    def _encode(self, pieces: Sequence[_Text | _Special | _Item]) -> ChatTokens:
        ids: list[int] = []
        is_target: list[bool] = []
        positions: dict[str, list[int]] = {name: [] for name in self.modalities}
        for piece in _merge_texts(pieces):
            match piece:
                case _Special(token_id, target):
                    ids.append(token_id)
                    is_target.append(target)
                case _Text(text, target):
                    words = self.tokenizer.encode(text)
                    ids += words
                    is_target += [target] * len(words)
                case _Item(name):
                    token, count = self.tokenizer.placeholder_ids[name], self.modalities[name].num_tokens
                    positions[name] += range(len(ids) + 1, len(ids) + 1 + count)
                    ids += [token.start] + [token.pad] * count + [token.end]
                    is_target += [False] * (count + 2)
        return ChatTokens(
            input_ids=torch.tensor(ids, dtype=torch.int64),
            is_target=torch.tensor(is_target, dtype=torch.bool),
            media_positions={name: torch.tensor(index, dtype=torch.int64) for name, index in positions.items()},
        )


def parse_messages(raw: object) -> list[Message]:
    """Read a row's `messages`: a list of {"role": str, "content": str}.

    Raises:
        BadSample: bad_row, if it has another form.
    """
    if not isinstance(raw, list):
        raise BadSample("bad_row", f"messages is {type(raw).__name__}, expected a list of turns")
    messages = []
    for i, turn in enumerate(raw):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise BadSample("bad_row", f"turn {i} is not an object with a string role and a string content")
        if not is_unicode(turn["content"]):
            raise BadSample("bad_row", f"turn {i} is not valid Unicode")
        messages.append(Message(role=turn["role"], content=turn["content"]))
    return messages


def is_unicode(text: str) -> bool:
    """Whether a string can be encoded as UTF-8: JSON may hold lone surrogates, which no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _merge_texts(pieces: Sequence[_Text | _Special | _Item]) -> list[_Text | _Special | _Item]:
    """Join neighbouring texts of the same loss, so that the tokens are those of the text between two special tokens.

    An assistant's header stays apart from its content, since generation starts between them.
    """
    merged: list[_Text | _Special | _Item] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, _Text) and isinstance(last, _Text) and piece.is_target == last.is_target:
            merged[-1] = _Text(last.text + piece.text, last.is_target)
        else:
            merged.append(piece)
    return merged
