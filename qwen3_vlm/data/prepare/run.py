"""A reader's rows -> parts, in parallel and restartable -> the prepared folder.

    OUT/train.jsonl, val.jsonl    {"id", "messages": [{"role", "content"}], "media": {"image": [name]}} a line
    OUT/*.jsonl.idx               energon's row offsets
    OUT/media/                    images that had to be unpacked: from zips, or from inside of rows
    OUT/shards/                   form tar: all images of the kept rows, once each, with energon's index
    OUT/dataset.yaml              energon metadataset: splits train and val, where the images are as store "image"
    OUT/dropped.jsonl             {"key", "reason", "detail"} of each row left out
    OUT/report.json, report.png   counts; report.json is written last: a folder without it is unfinished
    OUT/.work/                    parts of an unfinished preparation; the same command goes on from them

Images are not opened or decoded here: broken ones are skipped, and counted, when they are streamed. Each part is a
function of its piece of the input alone, so that the result depends neither on jobs nor on interruptions.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import yaml
from megatron.energon import CrudeJsonlDatasetFactory
from megatron.energon.epathlib import EPath

from qwen3_vlm.data.archive import Unpacked
from qwen3_vlm.data.prepare import shards
from qwen3_vlm.data.prepare.pool import Task, run_tasks
from qwen3_vlm.data.prepare.report import Histogram, Report, draw
from qwen3_vlm.data.prepare.rows import Dropped, Message, Root, Row, characters
from qwen3_vlm.errors import DataError
from qwen3_vlm.logging import get_logger
from qwen3_vlm.modality.image import ImageModality

log = get_logger(__name__)

WORK = ".work"
WORK_VERSION = 1
"""Raised when parts of an older version cannot be continued."""
ROOTS: tuple[Root, ...] = ("given", "own")
SUFFIX = {"given": "", "own": "-unpacked"}
"""Of the split's file, where rows of both roots were kept: a data set has one image store."""


class Form(StrEnum):
    """Where images are read from in training."""

    jsonl = "jsonl"
    """The files themselves; nothing is copied."""
    tar = "tar"
    """Indexed tar shards with each image once: for object stores and for file systems that dislike small files."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to prepare."""

    val_fraction: float = 0.0
    """Share of the rows, in [0, 1), that becomes the val split; a row's id alone decides, so that the split is stable
    when rows come or go."""
    limit: int | None = None
    """Read the first so many rows only (stage 0 takes 200); None reads all."""
    repair_placeholders: bool = False
    """Add missing sentinels and remove superfluous ones, as Mantis' loader does, instead of dropping the row."""
    form: Form = Form.jsonl
    jobs: int = 1
    """Worker processes."""
    shard_images: int = 5000
    """Images of a tar shard."""
    measure: Callable[[Sequence[Message], int], int] | None = None
    """Tokens of (messages, number of images); None: lengths are in characters."""
    measured_by: str = "characters"
    """What measure depends on: parts that another one has measured are not continued."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"val_fraction is {self.val_fraction}, expected 0 <= val_fraction < 1")
        for name in ("jobs", "shard_images"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of the input."""

    name: str
    """For messages."""
    rows: int
    payload: Any
    """What the reader needs to find it; pickled on the way to a worker."""


class Reader(Protocol):
    """One public form."""

    def parts(self) -> Iterator[Part]:
        """The input in pieces, the same ones for the same input."""

    def read(self, part: Part) -> Iterator[Row | Dropped]:
        """Convert every row of a piece."""


@dataclass(kw_only=True)
class Workspace:
    """Folders of a preparation under way."""

    out: Path
    media: Path
    """Where a reader unpacks images."""
    archives: list[Unpacked]

    @property
    def work(self) -> Path:
        return self.out / WORK

    def record(self, unpacked: Unpacked) -> None:
        """Have an archive's refusals reported."""
        self.archives.append(unpacked)


def prepare(
    open_reader: Callable[[Workspace], Reader],
    *,
    inputs: Sequence[Path],
    given: Path,
    out: Path,
    options: Options,
) -> Report:
    """Prepare what a reader reads.

    Args:
        open_reader: makes the reader; may unpack images into the workspace first.
        inputs: what the result depends on: unfinished work of other inputs is thrown away.
        given: the folder of images that the user named.
        out: folder to write.
        options: how.

    Returns:
        What OUT/report.json says.

    Raises:
        DataError: the input cannot be used, or no row is left for training.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "dataset.yaml"):
        (out / name).unlink(missing_ok=True)
    is_tar = options.form is Form.tar
    workspace = Workspace(out=out, media=out / WORK / "media" if is_tar else out / "media", archives=[])
    _start(workspace, inputs, options)
    workspace.media.mkdir(exist_ok=True)
    parts = _convert(open_reader(workspace), workspace.work / "parts", options)
    merged = _merge(parts, workspace, options)
    if merged.report.train == 0:
        raise DataError(_nothing_left(inputs[0], merged))
    roots: dict[Root, Path] = {"given": given, "own": workspace.media}
    if is_tar:
        images = [(roots[root], name) for root, name in merged.numbers]
        merged.report.unreadable_images = shards.write_shards(images, out, size=options.shard_images, jobs=options.jobs)
    _publish(workspace, merged, roots, options)
    shutil.rmtree(workspace.work)
    if workspace.media.is_dir() and not any(workspace.media.iterdir()):
        workspace.media.rmdir()
    return merged.report


def _start(workspace: Workspace, inputs: Sequence[Path], options: Options) -> None:
    """Keep unfinished work of the same inputs and options, remove any other."""
    described = asdict(options) | {"jobs": None, "measure": None, "version": WORK_VERSION}
    described["inputs"] = [_identity(path) for path in inputs]
    text = json.dumps(described, default=str, indent=1) + "\n"
    state = workspace.work / "state.json"
    if state.is_file() and state.read_text() == text:
        log.info("going on with the unfinished preparation in %s", workspace.work)
        return
    shutil.rmtree(workspace.work, ignore_errors=True)
    shards.remove(workspace.out)
    workspace.work.mkdir()
    _write_whole(state, text)


def _identity(path: Path) -> tuple[str, int, int]:
    """A file by its size and time; a folder by its path alone."""
    status = path.stat()
    return (str(path.resolve()), 0, 0) if path.is_dir() else (str(path.resolve()), status.st_size, status.st_mtime_ns)


# Parts: what the workers write.


def _convert(reader: Reader, folder: Path, options: Options) -> list[Path]:
    """Write every part, in parallel; those that an earlier run has written stay. Returns them in order."""
    folder.mkdir(exist_ok=True)
    parts: list[Path] = []

    def tasks() -> Iterator[Task]:
        for number, part in enumerate(reader.parts()):
            parts.append(folder / f"{number:06d}")
            done = _index_file(parts[-1]).is_file()
            yield Task(name=part.name, size=part.rows, payload=None if done else (part, parts[-1]))

    def work(payload: tuple[Part, Path]) -> None:
        _write_part(reader.read(payload[0]), payload[1], options)

    for _ in run_tasks(tasks(), work, jobs=options.jobs, title="rows", unit=" rows"):
        pass
    return parts


def _write_part(rows: Iterator[Row | Dropped], path: Path, options: Options) -> None:
    """Write the kept rows to PATH.jsonl, then what merging needs to know of them to PATH.json."""
    dropped: list[tuple[str, str, str]] = []
    kept: list[tuple[str, int, int, int, int]] = []
    notes: Counter[str] = Counter()
    with _rows_file(path).open("wb") as lines:
        for row in rows:
            if isinstance(row, Dropped):
                dropped.append((row.key, row.reason, row.detail))
                continue
            text = characters(row.messages)
            length = text if options.measure is None else options.measure(row.messages, len(row.images))
            kept.append((row.key, len(row.images), ROOTS.index(row.root), text, length))
            notes.update(row.notes)
            fields = {"id": row.key, "messages": row.messages, "media": {ImageModality.name: row.images}}
            lines.write(json.dumps(fields).encode() + b"\n")
    _write_whole(_index_file(path), json.dumps({"kept": kept, "dropped": dropped, "notes": notes}))


def _rows_file(part: Path) -> Path:
    return part.with_suffix(".jsonl")


def _index_file(part: Path) -> Path:
    return part.with_suffix(".json")


# Merging: what needs all rows in order.


@dataclass(kw_only=True)
class _Merged:
    """The rows of all parts, in files under the work folder."""

    report: Report = field(default_factory=Report)
    examples: dict[str, str] = field(default_factory=dict)
    """One dropped row for each reason."""
    lines: dict[tuple[str, Root], int] = field(default_factory=dict)
    """Rows by split and root."""
    numbers: dict[tuple[Root, str], int] = field(default_factory=dict)
    """Form tar: images in the order of their first use."""


def _merge(parts: Sequence[Path], workspace: Workspace, options: Options) -> _Merged:
    """Give keys their final form, split off validation, count; for form tar, number the images."""
    merged = _Merged()
    report = merged.report
    report.form = str(options.form)
    report.archives = {archive.archive: archive.refused for archive in workspace.archives if archive.refused}
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    uses: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    images: Counter[int] = Counter()
    with ExitStack() as stack:
        drops = stack.enter_context((workspace.work / "dropped.jsonl").open("w"))
        files: dict[tuple[str, Root], BinaryIO] = {}
        for part in parts:
            index = json.loads(_index_file(part).read_text())
            report.rows += len(index["kept"]) + len(index["dropped"])
            notes.update(index["notes"])
            for key, reason, detail in index["dropped"]:
                dropped[reason] += 1
                merged.examples.setdefault(reason, f"{key}: {detail}")
                drops.write(json.dumps({"key": key, "reason": reason, "detail": detail}) + "\n")
            with _rows_file(part).open("rb") as lines:
                for line, (key, num_images, root_index, text, length) in zip(lines, index["kept"], strict=True):
                    split = "val" if _unit_hash(key) < options.val_fraction else "train"
                    _count(report, split, num_images, text)
                    lengths[length] += 1
                    images[num_images] += 1
                    line = _with_key(line, key, _unique(key, uses))
                    root = ROOTS[root_index]
                    if options.form is Form.tar:
                        line, root = _with_numbers(line, root, merged.numbers), "given"
                    place = (split, root)
                    if place not in files:
                        files[place] = stack.enter_context(_merged_file(workspace, place).open("wb"))
                    files[place].write(line)
                    merged.lines[place] = merged.lines.get(place, 0) + 1
    report.dropped, report.notes = dict(sorted(dropped.items())), dict(sorted(notes.items()))
    unit = "characters" if options.measure is None else "tokens"
    report.length = Histogram.of(lengths, unit=unit, by_power=True)
    report.images_per_row = Histogram.of(images, unit="images", by_power=False)
    return merged


def _merged_file(workspace: Workspace, place: tuple[str, Root]) -> Path:
    return workspace.work / f"{place[0]}-{place[1]}.jsonl"


def _count(report: Report, split: str, images: int, text: int) -> None:
    report.kept += 1
    report.images += images
    if split == "val":
        report.val += 1
    else:
        report.train += 1
        report.train_images += images
        report.train_characters += text


def _with_key(line: bytes, key: str, unique: str) -> bytes:
    if unique == key:
        return line
    return json.dumps({"id": unique})[:-1].encode() + line[len(json.dumps({"id": key})) - 1 :]


def _with_numbers(line: bytes, root: Root, numbers: dict[tuple[Root, str], int]) -> bytes:
    """Rename a row's images to their entries in the shards."""
    fields = json.loads(line)
    names = fields["media"][ImageModality.name]
    found = [numbers.setdefault((root, name), len(numbers)) for name in names]
    fields["media"][ImageModality.name] = [
        shards.entry_name(number, name) for number, name in zip(found, names, strict=True)
    ]
    return json.dumps(fields).encode() + b"\n"


def _unique(key: str, uses: Counter[str]) -> str:
    """The key itself at its first use, then key#2, key#3, ... past ids of the source that look like that."""
    unique = key
    while unique in uses:
        uses[key] += 1
        unique = f"{key}#{uses[key]}"
    uses[unique] += 1
    return unique


def _unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _nothing_left(source: Path, merged: _Merged) -> str:
    report = merged.report
    examples = "".join(f"; for example {example}" for example in list(merged.examples.values())[:3])
    return f"{source}: of {report.rows} rows none is left for training (dropped: {report.dropped}){examples}"


# Publishing: finished files get their names.


def _publish(workspace: Workspace, merged: _Merged, roots: Mapping[Root, Path], options: Options) -> None:
    """Give the finished files their names: data, then index, then dataset.yaml, then the report."""
    out = workspace.out
    for split in ("train", "val"):
        for suffix in SUFFIX.values():
            for stale in (out / f"{split}{suffix}.jsonl", out / f"{split}{suffix}.jsonl.idx"):
                stale.unlink(missing_ok=True)
    used = [root for root in ROOTS if any(place[1] == root for place in merged.lines)]
    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        leaves = []
        for root in used:
            if (split, root) not in merged.lines:  # energon refuses empty files; a split without rows is no split
                continue
            final = out / f"{split}{SUFFIX[root] if len(used) > 1 else ''}.jsonl"
            _merged_file(workspace, (split, root)).replace(final)
            CrudeJsonlDatasetFactory.prepare_dataset(EPath(final))
            store = shards.FOLDER if options.form is Form.tar else f"filesystem://{_store_path(out, roots[root])}"
            has_store = options.form is Form.jsonl or shards.exist(out)
            leaves.append({"path": final.name} | ({"aux": {ImageModality.name: store}} if has_store else {}))
        if len(leaves) == 1:
            splits[split] = leaves[0]
        elif leaves:
            splits[split] = {"blend_epochized": [{"repetitions": 1} | leaf for leaf in leaves]}
    metadataset = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    _write_whole(out / "dataset.yaml", yaml.safe_dump(metadataset, sort_keys=False))
    (workspace.work / "dropped.jsonl").replace(out / "dropped.jsonl")
    draw(merged.report, workspace.work / "report.png")
    (workspace.work / "report.png").replace(out / "report.png")
    _write_whole(out / "report.json", json.dumps(asdict(merged.report), indent=2) + "\n")


def _store_path(out: Path, folder: Path) -> str:
    """Relative if the images lie inside OUT (the folder can then be moved as a whole), else absolute."""
    root, base = folder.resolve(), out.resolve()
    return str(root.relative_to(base)) if root.is_relative_to(base) and root != base else str(root)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
