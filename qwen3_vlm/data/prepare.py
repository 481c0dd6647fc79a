"""LLaVA-form JSON -> a prepared folder that `RowLoader` streams.

    OUT/train.jsonl, val.jsonl    {"id", "messages": [{"role", "content"}], "media": {"image": ["rel/path.jpg"]}} a line
    OUT/*.jsonl.idx               energon's row offsets
    OUT/dataset.yaml              energon metadataset: splits train and val, the image folder as store "image"
    OUT/report.json               what was kept and dropped; written last, so that a folder without it is unfinished

Images are not copied, opened or decoded here: broken ones are skipped, and counted, when they are streamed.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from megatron.energon import CrudeJsonlDatasetFactory
from megatron.energon.epathlib import EPath
from tqdm import tqdm

from qwen3_vlm.data.chat import is_unicode
from qwen3_vlm.data.store import MediaFolder
from qwen3_vlm.errors import BadSample, DataError
from qwen3_vlm.modality.image import ImageModality

ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system"}

_NOT_SPACE = re.compile(r"[^ \t\r\n]")

LLAVA_PRETRAIN_FILE = "blip_laion_cc_sbu_558k.json"
"""The conversations of LLaVA-Pretrain; the same folder also holds a ..._meta.json of another form."""


@dataclass(kw_only=True)
class Report:
    """report.json: rows = kept + sum of dropped, kept = train + val."""

    rows: int = 0
    kept: int = 0
    images: int = 0
    """Images of the kept rows."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason; one reason a row."""
    train: int = 0
    val: int = 0
    train_characters: int = 0
    """Characters of all turns of the training rows, sentinels left out; with train_images and the tokens an image
    takes, an estimate of the tokens of a pass (about 4 characters a token in English)."""
    train_images: int = 0


def prepare_llava(
    source: Path, images: Path, out: Path, *, val_fraction: float = 0.0, limit: int | None = None
) -> Report:
    """Prepare LLaVA-form conversations.

    Args:
        source: a JSON list, a JSONL file, or a folder that holds one (see `find_source`).
        images: folder that the rows' image names are relative to.
        out: folder to write; files of an earlier preparation are replaced, others are left alone.
        val_fraction: share of the rows, in [0, 1), that becomes the val split; a row's id alone decides, so that
            the split is stable when rows come or go.
        limit: read the first so many rows only (stage 0 takes 200); None reads all.

    Returns:
        What OUT/report.json says.

    Raises:
        DataError: the source or the image folder cannot be used, or no row is left for training.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}, expected 0 <= val_fraction < 1")
    folder = MediaFolder(images)
    file = find_source(source)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "dataset.yaml"):
        (out / name).unlink(missing_ok=True)

    report = Report()
    dropped: Counter[str] = Counter()
    uses: Counter[str] = Counter()
    partial = {split: out / f"{split}.jsonl.partial" for split in ("train", "val")}
    with partial["train"].open("w") as train, partial["val"].open("w") as val:
        rows = islice(iter_rows(file), limit)
        for index, raw in enumerate(tqdm(rows, desc=file.name, unit=" rows", disable=None)):
            report.rows += 1
            try:
                row = convert_llava_row(raw, index, folder)
            except BadSample as bad:
                dropped[bad.reason] += 1
                continue
            is_val = _unit_hash(row["id"]) < val_fraction
            _count(report, row, is_val)
            row["id"] = _unique(row["id"], uses)
            (val if is_val else train).write(json.dumps(row) + "\n")
    report.dropped = dict(sorted(dropped.items()))
    if report.train == 0:
        raise DataError(f"{file}: of {report.rows} rows none is left for training (dropped: {report.dropped})")
    _publish(out, partial, report, folder)
    return report


def find_source(source: Path) -> Path:
    """The JSON or JSONL file that `--source` means: the file, LLaVA-Pretrain's in a folder, or the folder's only one.

    Raises:
        DataError: there is none, or several.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"--source {source} does not exist")
    if (source / LLAVA_PRETRAIN_FILE).is_file():
        return source / LLAVA_PRETRAIN_FILE
    files = sorted(path for path in source.iterdir() if path.suffix in (".json", ".jsonl"))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise DataError(f"--source {source}: expected one .json or .jsonl file, found {names}; name the file itself")
    return files[0]


def iter_rows(file: Path) -> Iterator[Any]:
    """Rows of a JSON list or a JSONL file, one at a time; a broken JSONL line comes as None.

    Only the text of a JSON list is held in memory, not its objects.

    Raises:
        DataError: the file is neither.
    """
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            yield from (_parse_line(line) for line in lines if line.strip())
        return
    yield from _iter_json_list(file)


def convert_llava_row(raw: Any, index: int, folder: MediaFolder) -> dict[str, Any]:
    """One LLaVA row -> one prepared row.

    Args:
        raw: {"id", "image": name or list of names, "conversations": [{"from": human|gpt|system, "value"}]}; without
            an image the row is text only.
        index: of the row in its file; stands in for a missing id.
        folder: where images are looked up.

    Raises:
        BadSample: bad_row, empty_conversation, placeholder_mismatch, outside_root, missing_file or unreadable_file.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise BadSample("bad_row", f"row {index} is not an object with a list of conversations")
    messages = [_convert_turn(turn, index) for turn in raw["conversations"]]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadSample("empty_conversation", f"row {index} has {len(messages)} turns, none of gpt")
    names = raw.get("image")
    if names is None or names == "":
        names = []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample("bad_row", f"row {index}: image is neither a name nor a list of names")
    sentinels = sum(message["content"].count(ImageModality.sentinel) for message in messages)
    if sentinels != len(names):
        raise BadSample("placeholder_mismatch", f"row {index}: {sentinels} sentinels, {len(names)} images")
    for name in names:
        folder.locate(name)
    key = f"row-{index}" if raw.get("id") in (None, "") else str(raw["id"])
    if not all(map(is_unicode, [key, *(message["content"] for message in messages)])):
        raise BadSample("bad_row", f"row {index} is not valid Unicode")
    return {"id": key, "messages": messages, "media": {ImageModality.name: names}}


def _convert_turn(turn: Any, index: int) -> dict[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in ROLE_OF or not isinstance(turn.get("value"), str):
        raise BadSample("bad_row", f"row {index}: a turn is not {{'from': {'|'.join(ROLE_OF)}, 'value': str}}")
    return {"role": ROLE_OF[turn["from"]], "content": turn["value"]}


def _count(report: Report, row: dict[str, Any], is_val: bool) -> None:
    images = len(row["media"][ImageModality.name])
    characters = sum(len(message["content"]) for message in row["messages"])
    report.kept += 1
    report.images += images
    if is_val:
        report.val += 1
    else:
        report.train += 1
        report.train_images += images
        report.train_characters += characters - images * len(ImageModality.sentinel)


def _publish(out: Path, partial: dict[str, Path], report: Report, folder: MediaFolder) -> None:
    """Give the finished files their names: data, then index, then dataset.yaml, then the report."""
    splits = {}
    for split, path in partial.items():
        final = out / f"{split}.jsonl"
        if path.stat().st_size == 0:  # energon refuses empty files; a split without rows is no split
            for stale in (path, final, out / f"{split}.jsonl.idx"):
                stale.unlink(missing_ok=True)
            continue
        path.replace(final)
        CrudeJsonlDatasetFactory.prepare_dataset(EPath(final))
        splits[split] = {"path": final.name, "aux": {ImageModality.name: f"filesystem://{_store_path(out, folder)}"}}
    metadataset = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    _write_whole(out / "dataset.yaml", yaml.safe_dump(metadataset, sort_keys=False))
    _write_whole(out / "report.json", json.dumps(asdict(report), indent=2) + "\n")


def _store_path(out: Path, folder: MediaFolder) -> str:
    """Relative if the images lie inside OUT (the folder can then be moved as a whole), else absolute."""
    root, base = folder.root, out.resolve()
    return str(root.relative_to(base)) if root.is_relative_to(base) and root != base else str(root)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


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


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _iter_json_list(file: Path) -> Iterator[Any]:
    text = file.read_text(encoding="utf-8")
    decoder = json.JSONDecoder()

    def token_at(position: int) -> int:
        match = _NOT_SPACE.search(text, position)
        if match is None:
            raise ValueError(f"it ends early, after {len(text)} characters")
        return match.start()

    try:
        position = token_at(0)
        if text[position] != "[":
            raise ValueError(f"expected a list, found {text[position : position + 20]!r}")
        position = token_at(position + 1)
        while text[position] != "]":
            row, position = decoder.raw_decode(text, position)
            yield row
            position = token_at(position)
            if text[position] == ",":
                position = token_at(position + 1)
            elif text[position] != "]":
                raise ValueError(
                    f"expected ',' or ']', found {text[position : position + 20]!r} at character {position}"
                )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a JSON list: {error}") from error
