"""One row on its way from a public data set into the prepared form, and the checks that all sources share.

A row that cannot be used is a `Dropped` with one reason, never an exception that ends the preparation.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen3_vlm.data.chat import is_unicode
from qwen3_vlm.data.store import MediaFolder, check_name
from qwen3_vlm.errors import BadSample
from qwen3_vlm.modality.image import ImageModality

SENTINEL = ImageModality.sentinel

Root = Literal["given", "own"]
"""given: the folder that the user named; own: files that preparation itself unpacked into OUT."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Message = dict[str, str]
"""{"role": system, user or assistant; "content": text with a sentinel where an image belongs}"""


@dataclass(kw_only=True)
class Row:
    """A row that can be used."""

    key: str
    messages: list[Message]
    images: list[str]
    root: Root = "given"
    notes: Sequence[str] = ()
    """What was changed or left out of it: repaired_placeholders, skipped_first_turn."""


@dataclass(kw_only=True)
class Dropped:
    """A row that cannot be used."""

    key: str
    reason: str
    detail: str


@dataclass(kw_only=True)
class Draft:
    """A row before its images are looked up."""

    messages: list[Message]
    notes: list[str] = field(default_factory=list)


def read_turn(turn: Any, where: str) -> Message:
    """Read one turn: role|from and content|value|text, in any of the spellings that public sets use.

    Raises:
        BadSample: bad_row.
    """
    if isinstance(turn, dict):
        role = turn.get("from") if turn.get("from") is not None else turn.get("role")
        content = next((turn[name] for name in ("value", "content", "text") if turn.get(name) is not None), None)
        if isinstance(role, str) and role.lower() in _ROLES and isinstance(content, str):
            if not is_unicode(content):
                raise BadSample("bad_row", f"{where} is not valid Unicode")
            return {"role": _ROLES[role.lower()], "content": content}
    raise BadSample("bad_row", f"{where} is not {{from or role: {'|'.join(_ROLES)}, value or content or text: str}}")


def check_conversation(messages: Sequence[Message]) -> None:
    """Refuse what would train nothing, or teach to answer nothing.

    Raises:
        BadSample: empty_conversation: no assistant's turn, or one without a word.
    """
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadSample("empty_conversation", f"{len(messages)} turns, none of the assistant")
    if not all(answer.strip() for answer in answers):
        raise BadSample("empty_conversation", f"one of {len(answers)} assistant turns is empty")


def check_placeholders(draft: Draft, num_images: int, *, repair: bool) -> None:
    """Compare sentinels with images; repair as Mantis' own loader does, if asked to.

    Missing sentinels are put before the first turn, superfluous ones are removed from the end.

    Raises:
        BadSample: placeholder_mismatch, unless repair is set.
    """
    sentinels = count_sentinels(draft.messages)
    if sentinels == num_images:
        return
    if not repair or not draft.messages:
        raise BadSample("placeholder_mismatch", f"{sentinels} {SENTINEL} in the text, {num_images} images")
    if sentinels < num_images:
        first = draft.messages[0]
        first["content"] = f"{SENTINEL} " * (num_images - sentinels) + first["content"]
    for message in reversed(draft.messages):
        while sentinels > num_images and SENTINEL in message["content"]:
            before, _, behind = message["content"].rpartition(SENTINEL)
            message["content"] = before + behind
            sentinels = count_sentinels(draft.messages)
    draft.notes.append("repaired_placeholders")


def count_sentinels(messages: Sequence[Message]) -> int:
    """Sentinels of all turns."""
    return sum(message["content"].count(SENTINEL) for message in messages)


def characters(messages: Sequence[Message]) -> int:
    """Characters of all turns, sentinels left out."""
    return sum(len(message["content"]) for message in messages) - count_sentinels(messages) * len(SENTINEL)


def key_of(raw: Any, default: str) -> str:
    """A row's id as a string; default stands in for one that is missing or no text.

    Lone surrogates, which no file takes, are written as escapes: the row is dropped later, but has to be named.
    """
    value = raw.get("id") if isinstance(raw, Mapping) else None
    if value is None or value == "" or not isinstance(value, str | int | float):
        return default
    return str(value).encode("utf-8", "backslashreplace").decode()


class KnownFiles:
    """Looks up many names of a media folder: each subfolder is listed once, instead of one lookup a name.

    Args:
        folder: answers for every name that the lists do not settle (links, faults).
    """

    def __init__(self, folder: MediaFolder):
        self._folder = folder
        self._lists: dict[str, frozenset[str]] = {}

    def check(self, name: str) -> None:
        """Make sure that a file of this name exists below the folder.

        Raises:
            BadSample: as `MediaFolder.locate`.
        """
        check_name(name)
        parent, _, base = name.rpartition("/")
        if parent not in self._lists:
            self._lists[parent] = self._list(parent)
        if base not in self._lists[parent]:
            self._folder.locate(name)

    def _list(self, parent: str) -> frozenset[str]:
        try:
            path = (self._folder.root / parent).resolve()
            if not path.is_relative_to(self._folder.root):
                return frozenset()
            with os.scandir(path) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
        except (OSError, RuntimeError):  # locate() finds the same fault again and names it
            return frozenset()
