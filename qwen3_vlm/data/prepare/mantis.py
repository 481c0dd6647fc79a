"""Mantis-Instruct's form: SUBSET/*.parquet, images by path beside it (folder or zip) or inline in the row.

The fields are those that Mantis' own loader takes (github.com/TIGER-AI-Lab/Mantis, mantis/train/data.py):
conversation or conversations, turns with role|from and content|value|text, images or a single image, each a path,
{path, bytes} or bytes.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
from qwen3_vlm.data.store import MAX_FILE_BYTES, MediaFolder, check_name
from qwen3_vlm.errors import BadSample, DataError
from qwen3_vlm.logging import get_logger

log = get_logger(__name__)

COLUMNS = ("id", "conversation", "conversations", "images", "image")
ROWS_PER_READ = 64
"""Rows that are in memory at a time; inline images make them large."""
INLINE = "inline"
"""Folder of images that came inside the rows, by the hash of their content."""


def prepare_mantis(source: Path, images: Path, out: Path, options: Options | None = None, **changes: Any) -> Report:
    """Prepare Mantis-Instruct.

    Args:
        source: folder that holds SUBSET/*.parquet.
        images: folder that holds SUBSET/train_images/ or SUBSET/train_images.zip; usually the same folder. Paths in
            rows are relative to SUBSET.
        out: folder to write; files of an earlier preparation are replaced, others are left alone.
        options: how; `changes` are its fields.

    Returns:
        What OUT/report.json says.

    Raises:
        DataError: a folder, a parquet file or a zip cannot be used, or no row is left for training.
    """
    options = options or Options(**changes)
    files = find_parquet(source)
    folder = MediaFolder(images)
    archives = {
        f"{subset}/{path.stem}": path
        for subset in sorted({file.parent.name for file in files})
        for path in sorted((folder.root / subset).glob("*images*.zip"))
        if not (folder.root / subset / path.stem).is_dir()
    }

    def open_reader(workspace: Workspace) -> MantisReader:
        for name, archive in archives.items():
            workspace.record(unpack_zip(archive, workspace.media / name))
        return MantisReader(
            files=files, given=folder, own=MediaFolder(workspace.media), unpacked=set(archives), options=options
        )

    return prepare(open_reader, inputs=[*files, *archives.values()], given=images, out=out, options=options)


def find_parquet(source: Path) -> list[Path]:
    """The parquet files of all subsets, in order.

    Raises:
        DataError: there is none.
    """
    if not source.is_dir():
        raise DataError(f"--source {source} is not a folder")
    files = sorted(file for file in source.glob("*/*.parquet") if not file.parent.name.startswith("."))
    if not files:
        hint = "; it holds parquet files itself: name the folder above it" if any(source.glob("*.parquet")) else ""
        raise DataError(f"--source {source}: no SUBSET/*.parquet in it{hint}")
    return files


@dataclass(kw_only=True)
class MantisReader:
    """Rows of several subsets."""

    files: list[Path]
    given: MediaFolder
    own: MediaFolder
    """Unpacked archives at SUBSET/FOLDER, inline images at inline/."""
    unpacked: set[str]
    """SUBSET/FOLDER that lie in `own`."""
    options: Options
    _known: dict[Root, KnownFiles] = field(init=False)

    def __post_init__(self) -> None:
        self._known = {"given": KnownFiles(self.given), "own": KnownFiles(self.own)}

    def parts(self) -> Iterator[Part]:
        """Row groups: (file, number of the row group, number of its first row in the file)."""
        left = self.options.limit
        for file in self.files:
            first = 0
            for group, rows in enumerate(_row_groups(file)):
                rows = rows if left is None else min(rows, left)
                if rows:
                    yield Part(name=f"{file.parent.name}/{file.name}", rows=rows, payload=(file, group, first))
                first += rows
                left = left if left is None else left - rows

    def read(self, part: Part) -> Iterator[Row | Dropped]:
        """Convert the rows of a part; those that cannot be read are dropped as unreadable_file."""
        file, group, first = part.payload
        subset = file.parent.name
        rows = _read_rows(file, group)
        fault = ""
        for number in range(first, first + part.rows):
            key = f"{subset}/{file.stem}-row-{number}"
            try:
                raw = None if fault else next(rows, None)
            except (pa.ArrowException, OSError, ValueError) as error:  # ArrowInvalid is a ValueError
                raw, fault = None, f"{file}, row group {group}: {type(error).__name__}: {str(error)[:200]}"
                log.warning("%d rows cannot be read: %s", first + part.rows - number, fault)
            if raw is None:
                detail = fault or f"{file}, row group {group} ends early"
                yield Dropped(key=key, reason="unreadable_file", detail=detail)
                continue
            key = f"{subset}/{key_of(raw, f'{file.stem}-row-{number}')}"
            try:
                yield self.convert(raw, key, subset)
            except BadSample as bad:
                yield Dropped(key=key, reason=bad.reason, detail=bad.detail)

    def convert(self, raw: Any, key: str, subset: str) -> Row:
        """One Mantis row; a first turn that is not the user's is left out, as in Mantis' own loader.

        Raises:
            BadSample: bad_row, empty_conversation, placeholder_mismatch, outside_root, missing_file,
                unreadable_file or file_too_large.
        """
        if not raw:
            raise BadSample("bad_row", "a value of the row is not valid text, or no column is known")
        turns = raw.get("conversation") if raw.get("conversation") is not None else raw.get("conversations")
        if not isinstance(turns, list):
            raise BadSample("bad_row", f"conversation is {type(turns).__name__}, expected a list of turns")
        draft = Draft(messages=[read_turn(turn, f"turn {i}") for i, turn in enumerate(turns)])
        if draft.messages and draft.messages[0]["role"] != "user":
            del draft.messages[0]
            draft.notes.append("skipped_first_turn")
        for i, message in enumerate(draft.messages):
            expected = "user" if i % 2 == 0 else "assistant"
            if message["role"] != expected:
                raise BadSample("bad_row", f"turn {i} is the {message['role']}'s, expected the {expected}'s")
        check_conversation(draft.messages)
        images = _image_list(raw)
        check_placeholders(draft, len(images), repair=self.options.repair_placeholders)
        check_conversation(draft.messages)
        root, names = self._place(images, subset)
        return Row(key=key, messages=draft.messages, images=names, root=root, notes=draft.notes)

    def _place(self, images: list[str | bytes], subset: str) -> tuple[Root, list[str]]:
        """Where the images of a row lie; all in one root: if they do not, copies go to where the inline ones go."""
        found = [self._find(image, subset) if isinstance(image, str) else image for image in images]
        roots = {"own" if isinstance(place, bytes) else place[0] for place in found}
        if not roots:
            return ("own" if any(name.startswith(f"{subset}/") for name in self.unpacked) else "given"), []
        if roots == {"given"}:
            return "given", [place[1] for place in found if not isinstance(place, bytes)]
        names = []
        for place in found:
            if isinstance(place, bytes):
                names.append(self._keep(place))
            elif place[0] == "own":
                names.append(place[1])
            else:
                names.append(self._keep(self.given.read(place[1])))
        return "own", names

    def _find(self, path: str, subset: str) -> tuple[Root, str]:
        check_name(path)
        name = f"{subset}/{PurePosixPath(path)}"
        folder = "/".join(PurePosixPath(name).parts[:2])
        root: Root = "own" if folder in self.unpacked else "given"
        self._known[root].check(name)
        return root, name

    def _keep(self, content: bytes) -> str:
        """Write an image under the hash of its content; what is there already is the same."""
        if len(content) > MAX_FILE_BYTES:
            raise BadSample("file_too_large", f"an inline image has {len(content)} bytes, at most {MAX_FILE_BYTES}")
        digest = hashlib.sha256(content).hexdigest()
        name = f"{INLINE}/{digest[:2]}/{digest}"
        path = self.own.root / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{digest}.{os.getpid()}.partial")
            partial.write_bytes(content)
            partial.replace(path)
        return name


def _image_list(raw: dict[str, Any]) -> list[str | bytes]:
    """A row's images as paths or bytes.

    Raises:
        BadSample: bad_row, or missing_file for an image without path and bytes.
    """
    value = raw.get("images")
    if value is None or value == []:
        value = raw.get("image")
    if value is None:
        return []
    images: list[str | bytes] = []
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
            if item is None:
                raise BadSample("missing_file", f"image {i} has neither bytes nor a path")
        if not isinstance(item, str | bytes) or not item:
            raise BadSample("bad_row", f"image {i} is {type(item).__name__}, expected a path, bytes or both")
        images.append(item)
    return images


def _row_groups(file: Path) -> list[int]:
    try:
        metadata = pq.read_metadata(file)
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{file} is not a whole parquet file: {type(error).__name__}: {str(error)[:200]}; download it again, or "
            "move it away to prepare the others"
        ) from error


def _read_rows(file: Path, group: int) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(file) as opened:
        columns = [name for name in COLUMNS if name in opened.schema_arrow.names]
        for batch in opened.iter_batches(ROWS_PER_READ, row_groups=[group], columns=columns, use_threads=False):
            try:
                rows = batch.to_pylist()
            except ValueError:  # a value that is no valid text: find the rows that can be read
                rows = [_row_or_empty(batch.slice(i, 1)) for i in range(batch.num_rows)]
            yield from rows


def _row_or_empty(row: pa.RecordBatch) -> dict[str, Any]:
    try:
        return row.to_pylist()[0]
    except ValueError:
        return {}
