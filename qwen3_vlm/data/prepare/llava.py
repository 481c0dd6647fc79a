"""LLaVA's form: a JSON list (or JSONL) of {id, image, conversations: [{from, value}]}, and a folder or zip of images.

The parent only finds where rows begin and end; worker processes parse and convert them.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qwen3_vlm.data.archive import unpack_zip
from qwen3_vlm.data.prepare.report import Report
from qwen3_vlm.data.prepare.rows import (
    Draft,
    Dropped,
    KnownFiles,
    Root,
    Row,
    check_conversation,
    check_placeholders,
    key_of,
    read_turn,
)
from qwen3_vlm.data.prepare.run import Options, Part, Workspace, prepare
from qwen3_vlm.data.store import MediaFolder
from qwen3_vlm.errors import BadSample, DataError

LLAVA_PRETRAIN_FILE = "blip_laion_cc_sbu_558k.json"
"""The conversations of LLaVA-Pretrain; the same folder also holds a ..._meta.json of another form."""
LLAVA_INSTRUCT_FILE = "llava_instruct_150k.json"
"""The stage 2 rows of LLaVA-Instruct-150K; the same folder holds their parts and the 665K mix."""

ROWS_PER_PART = 4000

_NOT_SPACE = re.compile(r"[^ \t\r\n]")


def prepare_llava(source: Path, images: Path, out: Path, options: Options | None = None, **changes: Any) -> Report:
    """Prepare LLaVA-form conversations.

    Args:
        source: a JSON list, a JSONL file, or a folder that holds one (see `find_source`).
        images: folder that the rows' image names are relative to, or a zip of it, which is unpacked once.
        out: folder to write; files of an earlier preparation are replaced, others are left alone.
        options: how; `changes` are its fields.

    Returns:
        What OUT/report.json says.

    Raises:
        DataError: the source or the images cannot be used, or no row is left for training.
    """
    options = options or Options(**changes)
    root: Root = "own" if images.suffix == ".zip" else "given"
    if root == "given":
        MediaFolder(images)  # says so now if there is none
    file = find_source(source)

    def open_reader(workspace: Workspace) -> LlavaReader:
        if root == "own":
            workspace.record(unpack_zip(images, workspace.media))
        folder = MediaFolder(workspace.media if root == "own" else images)
        return LlavaReader(file=file, folder=folder, root=root, options=options)

    return prepare(open_reader, inputs=[file, images], given=images, out=out, options=options)


def find_source(source: Path) -> Path:
    """The JSON or JSONL file that `--source` means: the file, a known one in a folder, or the folder's only one.

    Raises:
        DataError: there is none, or several.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"--source {source} does not exist")
    known = [source / name for name in (LLAVA_PRETRAIN_FILE, LLAVA_INSTRUCT_FILE) if (source / name).is_file()]
    if len(known) == 1:
        return known[0]
    files = sorted(path for path in source.iterdir() if path.suffix in (".json", ".jsonl"))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise DataError(f"--source {source}: expected one .json or .jsonl file, found {names}; name the file itself")
    return files[0]


@dataclass(kw_only=True)
class LlavaReader:
    """Rows of one file, images of one folder."""

    file: Path
    folder: MediaFolder
    root: Root
    options: Options

    def __post_init__(self) -> None:
        self._files = KnownFiles(self.folder)

    def parts(self) -> Iterator[Part]:
        """Pieces of the file that hold whole rows: (number of the first row, its text)."""
        first = 0
        texts = islice(iter_texts(self.file), self.options.limit)
        while chunk := list(islice(texts, ROWS_PER_PART)):
            yield Part(name=f"{self.file.name} from row {first}", rows=len(chunk), payload=(first, chunk))
            first += len(chunk)

    def read(self, part: Part) -> Iterator[Row | Dropped]:
        """Convert the rows of a part."""
        first, texts = part.payload
        for i, text in enumerate(texts):
            raw = _parse(text)
            key = key_of(raw, f"row-{first + i}")
            try:
                yield self.convert(raw, key)
            except BadSample as bad:
                yield Dropped(key=key, reason=bad.reason, detail=bad.detail)

    def convert(self, raw: Any, key: str) -> Row:
        """One LLaVA row.

        Args:
            raw: {"id", "image": name or list of names, "conversations": [{"from": human|gpt|system, "value"}]};
                without an image the row is text only.
            key: its id, or what stands in for a missing one.

        Raises:
            BadSample: bad_row, empty_conversation, placeholder_mismatch, outside_root, missing_file or
                unreadable_file.
        """
        if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
            raise BadSample("bad_row", "not an object with a list of conversations")
        draft = Draft(messages=[read_turn(turn, f"turn {i}") for i, turn in enumerate(raw["conversations"])])
        if isinstance(raw.get("id"), str) and key != raw["id"] and raw["id"]:
            raise BadSample("bad_row", "the id is not valid Unicode")
        check_conversation(draft.messages)
        names = raw.get("image")
        if names is None or names == "":
            names = []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadSample("bad_row", "image is neither a name nor a list of names")
        check_placeholders(draft, len(names), repair=self.options.repair_placeholders)
        check_conversation(draft.messages)
        for name in names:
            self._files.check(name)
        return Row(key=key, messages=draft.messages, images=names, root=self.root, notes=draft.notes)


def iter_texts(file: Path) -> Iterator[str | bytes]:
    """Texts of the rows of a JSON list or a JSONL file, one at a time.

    Only the text of a JSON list is held in memory, not its objects.

    Raises:
        DataError: the file is neither.
    """
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            yield from (line for line in lines if line.strip())
        return
    yield from _iter_json_list(file)


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _iter_json_list(file: Path) -> Iterator[str]:
    decoder = json.JSONDecoder()
    try:
        text = file.read_text(encoding="utf-8-sig")

        def token_at(position: int) -> int:
            match = _NOT_SPACE.search(text, position)
            if match is None:
                raise ValueError(f"it ends early, after {len(text)} characters")
            return match.start()

        position = token_at(0)
        if text[position] != "[":
            raise ValueError(f"expected a list, found {text[position : position + 20]!r}")
        position = token_at(position + 1)
        while text[position] != "]":
            _, end = decoder.raw_decode(text, position)
            yield text[position:end]
            position = token_at(end)
            if text[position] == ",":
                position = token_at(position + 1)
            elif text[position] != "]":
                raise ValueError(
                    f"expected ',' or ']', found {text[position : position + 20]!r} at character {position}"
                )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a JSON list: {error}") from error
