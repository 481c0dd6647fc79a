"""Broken rows, JSON, archives and parquet: nothing crashes, leaves its folder or enters silently; all is counted.

Each case is a good input with random damage. What may happen: rows are kept or dropped with a reason, and
rows = kept + dropped; or the whole input is refused with a DataError. Nothing else.
"""

import io
import json
import random
import stat
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_vlm.data.archive import unpack_zip
from qwen3_vlm.data.prepare import Options
from qwen3_vlm.data.prepare.llava import LlavaReader
from qwen3_vlm.data.prepare.mantis import MantisReader
from qwen3_vlm.data.prepare.rows import Dropped, Row, count_sentinels
from qwen3_vlm.data.store import MediaFolder
from qwen3_vlm.errors import BadSample, DataError
from tests.unit.data.cases import jpeg

REASONS = {
    "bad_row",
    "empty_conversation",
    "placeholder_mismatch",
    "outside_root",
    "missing_file",
    "unreadable_file",
    "file_too_large",
}
LONG = pytest.param(2500, id="long", marks=pytest.mark.full)
"""Of each of four kinds of input: 10,000 together."""
ROWS, FILES = [pytest.param(500, id="short"), LONG], [pytest.param(60, id="short"), LONG]

FOUND = {"kept", "bad_row", "empty_conversation", "placeholder_mismatch", "outside_root", "missing_file"}
"""What the damage below has to lead to: else it would test nothing."""

ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, 1e300, "", " ", "<image>", "<image><image>", "\ud800", "\0", "a\0b", "x" * 5000, [], {}),
    *([None], {"a": 1}, [[]], "../outside.jpg", "/etc/passwd", "..", ".", "sub/../../outside.jpg", "link.jpg", "loop"),
    *("a.jpg", "sub/b.jpg", "./a.jpg", "sub//b.jpg", "sub", "~/a.jpg", "file:///etc/passwd", "\u202egpj.a", "gpt"),
    *({"path": "/etc/passwd", "bytes": None}, {"bytes": b"x"}, {"path": "a.jpg"}, b"\xff\xd8", "system", "user"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        (folder / name).write_bytes(jpeg(9))
    (tmp_path / "outside.jpg").write_bytes(jpeg(1))
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def good_row(draw: random.Random, role: str, content: str, turns: str) -> dict[str, Any]:
    names = draw.choice([[], ["a.jpg"], ["a.jpg", "sub/b.jpg"]])
    conversation = [{role: "human", content: "<image>" * len(names) + "What?"}, {role: "gpt", content: "A cat."}]
    return {"id": str(draw.random()), "images": names, "image": names, turns: conversation}


def damage(value: Any, draw: random.Random) -> Any:
    """Change one place somewhere inside."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: damage(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        i = draw.randrange(len(value))
        return [*value[:i], damage(value[i], draw), *value[i + draw.choice([0, 1]) :]]
    return draw.choice(ODD)


def check(converted: list[Row | Dropped], rows: int, roots: dict[str, Path]) -> Counter[str]:
    """Every row came out once; a kept one is whole, and its images are files below their root."""
    assert len(converted) == rows
    for row in converted:
        row.key.encode()
        if isinstance(row, Dropped):
            assert row.reason in REASONS and row.detail
            continue
        assert count_sentinels(row.messages) == len(row.images)
        assert any(m["role"] == "assistant" and m["content"].strip() for m in row.messages)
        json.dumps([row.messages, row.images]).encode()
        for name in row.images:
            path = (roots[row.root] / name).resolve()
            assert path.is_file() and path.is_relative_to(roots[row.root].resolve())
    return Counter(row.reason if isinstance(row, Dropped) else "kept" for row in converted)


def flip(content: bytes, draw: random.Random) -> bytes:
    """Cut short, overwrite, insert or repeat somewhere."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 10])):
        i = draw.randrange(len(changed) or 1)
        match draw.randrange(4):
            case 0:
                changed[i : i + 1] = bytes([draw.randrange(256)])
            case 1:
                changed[i:i] = changed[: draw.randrange(20)]
            case 2:
                del changed[i : i + draw.randrange(1, 30)]
            case _:
                if draw.random() < 0.3:
                    del changed[i:]
    return bytes(changed)


@pytest.mark.parametrize("cases", ROWS)
def test_llava_rows(tmp_path: Path, images: Path, cases: int):
    draw = random.Random(1)
    outcomes: Counter[str] = Counter()
    for case in range(cases):
        rows = [good_row(draw, "from", "value", "conversations") for _ in range(4)]
        rows = [damage(row, draw) if draw.random() < 0.8 else row for row in rows]
        is_list = case % 2 == 0
        lines = [json.dumps(row, default=repr) for row in rows]
        content = ("[" + ",".join(lines) + "]" if is_list else "\n".join(lines)).encode()
        if case % 4 >= 2:
            content = flip(content, draw)
        file = tmp_path / ("rows.json" if is_list else "rows.jsonl")
        file.write_bytes(content)
        reader = LlavaReader(file=file, folder=MediaFolder(images), root="given", options=Options())
        try:
            for part in reader.parts():
                outcomes += check(list(reader.read(part)), part.rows, {"given": images})
        except DataError as error:
            assert "is not a JSON list" in str(error) and is_list
            outcomes["refused"] += 1
    assert outcomes.keys() >= FOUND | {"refused"}


@pytest.mark.parametrize("cases", ROWS)
def test_mantis_rows(tmp_path: Path, images: Path, cases: int):
    draw = random.Random(2)
    own = tmp_path / "own"
    own.mkdir()
    reader = mantis_reader([], images.parent, own)
    outcomes: Counter[str] = Counter()
    for _ in range(cases):
        raw = damage(good_row(draw, "role", "content", "conversation"), draw)
        raw = damage(raw, draw) if isinstance(raw, dict) and draw.random() < 0.5 else raw
        if not isinstance(raw, dict):  # parquet has no other rows
            continue
        try:
            converted: Row | Dropped = reader.convert(raw, "key", "images")
        except BadSample as error:
            converted = Dropped(key="key", reason=error.reason, detail=error.detail)
        outcomes += check([converted], 1, {"given": images.parent, "own": own})
    assert outcomes.keys() >= FOUND


def mantis_reader(files: list[Path], given: Path, own: Path) -> MantisReader:
    return MantisReader(files=files, given=MediaFolder(given), own=MediaFolder(own), unpacked=set(), options=Options())


@pytest.mark.parametrize("cases", FILES)
def test_parquet_files(tmp_path: Path, images: Path, cases: int):
    draw = random.Random(3)
    own = tmp_path / "own"
    own.mkdir()
    rows = [good_row(draw, "role", "content", "conversation") for _ in range(6)]
    for row in rows:
        row["image"] = {"path": None, "bytes": b"\xff\xd8" + row["id"].encode()}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    file = images.parent / "images" / "t.parquet"
    outcomes: Counter[str] = Counter()
    for _ in range(cases):
        file.write_bytes(flip(buffer.getvalue(), draw))
        reader = mantis_reader([file], images.parent, own)
        try:
            for part in reader.parts():
                if part.rows > 1000:  # a damaged footer may promise billions of rows; each is then counted as dropped
                    continue
                outcomes += check(list(reader.read(part)), part.rows, {"given": images.parent, "own": own})
        except DataError as error:
            assert "is not a whole parquet file" in str(error)
            outcomes["refused"] += 1
    assert outcomes.keys() >= {"kept", "unreadable_file", "refused"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("cases", FILES)
def test_archives(tmp_path: Path, cases: int):
    draw = random.Random(4)
    outcomes: Counter[str] = Counter()
    names = ["a.jpg", "d/b.jpg", "../c.jpg", "/d.jpg", "d/../../e.jpg", "d", "x" * 300, "\\..\\f.jpg", ".", "d/"]
    before = set(tmp_path.rglob("*"))
    for case in range(cases):
        path, target = tmp_path / "case.zip", tmp_path / f"out{case}"
        with zipfile.ZipFile(path, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for i in range(draw.randrange(1, 8)):
                info = zipfile.ZipInfo(draw.choice([*names, f"{i}.jpg", f"{i // 3}.jpg"]))
                info.compress_type = archive.compression
                info.external_attr = draw.choice([0, 0, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO]) << 16
                archive.writestr(info, draw.choice([b"/etc/passwd", b"x" * 100, b"\0" * 3_000_000 if i == 0 else b""]))
        if case % 2:
            path.write_bytes(flip(path.read_bytes(), draw))
        try:
            done = unpack_zip(path, target, threads=1)
        except DataError:
            outcomes["refused"] += 1
        else:
            files = [p for p in target.rglob("*") if not p.is_dir() and p.name != ".unpacked.json"]
            assert len(files) == done.files and not any(p.is_symlink() for p in files)
            assert sum(done.refused.values()) == len(done.details)
            outcomes.update(done.refused)
            outcomes["kept"] += done.files
    strange = {p for p in set(tmp_path.rglob("*")) - before if not p.relative_to(tmp_path).parts[0].startswith("out")}
    assert strange == {tmp_path / "case.zip"}
    assert outcomes.keys() >= {"kept", "outside_root", "not_a_file", "repeated_name", "bad_name", "bomb", "refused"}
