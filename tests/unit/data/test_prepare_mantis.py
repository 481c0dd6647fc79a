"""Mantis-Instruct: every form of its rows and images, planted errors with known counts, repair, and what is refused."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.prepare import Form, prepare_mantis
from qwen3_vlm.errors import DataError
from tests.unit.data.cases import jpeg, read_pass


def turns(*texts: str, role: str = "role", content: str = "content", first: int = 0) -> list[dict[str, str]]:
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: names[(i + first) % 2], content: text} for i, text in enumerate(texts)]


def write_subset(folder: Path, rows: list[dict[str, Any]], *, name: str = "train-00000-of-00001", **how: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, **how)
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of images, a zip of images, inline images with and without paths, a single image, odd turns."""
    root = tmp_path / "mantis"
    by_path = [
        {
            "id": "a",
            "images": ["train_images/0.jpg", "train_images/1.jpg"],
            "conversation": turns("<image><image>?", "A"),
        },
        {"id": "b", "images": ["./train_images/1.jpg"], "conversation": turns("What?", "here <image>", "x", "y")},
        {"id": "a", "images": [], "conversation": turns("Hi", "Yo")},
        {"id": None, "images": None, "conversation": turns("So", "Hi", "Yo", first=1)},
        {"id": "gone", "images": ["train_images/9.jpg"], "conversation": turns("<image>", "A")},
        {"id": "few", "images": ["train_images/0.jpg"], "conversation": turns("none", "A")},
        {
            "id": "many",
            "images": ["train_images/0.jpg"],
            "conversation": turns("<image>", "A <image>", "<image> B", "C"),
        },
        {"id": "out", "images": ["../zipped/0.jpg"], "conversation": turns("<image>", "A")},
        {"id": "abs", "images": ["/etc/passwd"], "conversation": turns("<image>", "A")},
        {"id": "twice", "images": [], "conversation": [*turns("Hi"), *turns("Hi", "Yo")]},
        {"id": "mute", "images": [], "conversation": turns("Hi", "")},
        {"id": "none", "images": [], "conversation": []},
    ]
    write_subset(root / "plain", by_path[:6])
    write_subset(root / "plain", by_path[6:], name="train-00001-of-00002", row_group_size=2)
    (root / "plain" / "train_images").mkdir()
    for i in range(2):
        (root / "plain" / "train_images" / f"{i}.jpg").write_bytes(jpeg(i))

    asked = turns("<image>?", "A", role="from", content="value")
    zipped = [{"id": f"z{i}", "images": [f"train_images/{i}.jpg"], "conversations": asked} for i in range(3)]
    write_subset(root / "zipped", zipped)
    with zipfile.ZipFile(root / "zipped" / "train_images.zip", "w") as archive:
        archive.writestr("train_images/0.jpg", jpeg(10))
        archive.writestr("train_images/1.jpg", jpeg(11))
        archive.writestr("../../escaped.jpg", jpeg(12))

    single = [
        {"path": "x.jpg", "bytes": jpeg(20)},
        {"path": None, "bytes": jpeg(21)},
        {"path": None, "bytes": jpeg(20)},
        {"path": None, "bytes": None},
        {"path": "here.jpg", "bytes": None},
    ]
    asked = turns("<image>?", "A", content="text")
    inline = [{"id": i, "image": image, "conversation": asked} for i, image in enumerate(single, 1)]
    write_subset(root / "inline", inline)
    (root / "inline" / "here.jpg").write_bytes(jpeg(22))
    return root


DROPPED = {
    "bad_row": 1,  # two user turns in a row
    "empty_conversation": 2,
    "missing_file": 3,  # a path that is not there, in the folder and in the zip; neither path nor bytes
    "outside_root": 2,
    "placeholder_mismatch": 2,
}


def kept_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(out.glob("train*.jsonl")) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("form", Form)
def test_forms_and_counts(tmp_path: Path, source: Path, make_loader: Callable[..., RowLoader], form: Form):
    out = tmp_path / "out"
    report = prepare_mantis(source, source, out, form=form, shard_images=3)
    assert report.dropped == DROPPED and report.rows == 20 == report.kept + sum(DROPPED.values())
    assert (report.train, report.val, report.images) == (10, 0, 9)
    assert report.notes == {"skipped_first_turn": 1}
    assert report.archives == {"train_images.zip": {"outside_root": 1}}
    assert not list(tmp_path.rglob("escaped.jpg"))
    assert report.images_per_row.rows == {"0": 2, "1": 7, "2": 1}
    keys = ["inline/1", "inline/2", "inline/3", "inline/5", "plain/a", "plain/a#2", "plain/b"]
    keys += ["plain/train-00000-of-00001-row-3", "zipped/z0", "zipped/z1"]
    assert sorted(row["id"] for row in kept_lines(out)) == keys
    named = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {(row["key"], row["reason"]) for row in named} == {
        ("inline/4", "missing_file"),
        ("plain/gone", "missing_file"),
        ("zipped/z2", "missing_file"),
        ("plain/few", "placeholder_mismatch"),
        ("plain/many", "placeholder_mismatch"),
        ("plain/out", "outside_root"),
        ("plain/abs", "outside_root"),
        ("plain/twice", "bad_row"),
        ("plain/mute", "empty_conversation"),
        ("plain/none", "empty_conversation"),
    }
    rows = read_pass(make_loader(out))
    assert sorted(key for row in rows for key in row.keys) == keys and not any(row.skipped for row in rows)
    # The pixels are those of the named images: each was written in a colour of its own.
    seen = sorted(int(item.float().mean().round()) for row in rows for item in row.media["image"].data)
    assert seen == [0, 1, 1, 10, 11, 20, 20, 21, 22]
    if form is Form.tar:
        assert not (out / "media").exists()  # nothing is left of what was unpacked on the way
        stored = len(list(out.glob("shards/*.tar"))), sum(1 for _ in out.rglob("*.jpg"))
        assert stored == (3, 0)  # 7 different images, 3 a shard
    else:
        leaves = yaml.safe_load((out / "dataset.yaml").read_text())["splits"]["train"]["blend_epochized"]
        assert [leaf["path"] for leaf in leaves] == ["train.jsonl", "train-unpacked.jsonl"]
        assert leaves[1]["aux"] == {"image": "filesystem://media"}  # OUT may be moved
        assert len(list((out / "media" / "inline").rglob("*/*"))) == 2  # equal images once


def test_first_turn_that_is_not_the_users_is_left_out(tmp_path: Path, source: Path):
    prepare_mantis(source, source, tmp_path / "out")
    row = next(row for row in kept_lines(tmp_path / "out") if row["id"].endswith("row-3"))
    assert row["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def test_repair_is_what_mantis_does_and_is_counted(tmp_path: Path, source: Path):
    report = prepare_mantis(source, source, tmp_path / "out", repair_placeholders=True)
    assert "placeholder_mismatch" not in report.dropped
    assert report.notes == {"repaired_placeholders": 2, "skipped_first_turn": 1} and report.kept == 12
    rows = {row["id"]: [m["content"] for m in row["messages"]] for row in kept_lines(tmp_path / "out")}
    assert rows["plain/few"] == ["<image> none", "A"]
    assert rows["plain/many"] == ["<image>", "A ", " B", "C"]


def test_a_row_with_images_inside_and_beside_it_has_them_in_one_place(
    tmp_path: Path, make_loader: Callable[..., RowLoader]
):
    root = tmp_path / "m"
    row = {
        "id": "r",
        "images": [{"path": "a.jpg", "bytes": None}, {"path": None, "bytes": jpeg(7)}],
        "conversation": turns("<image> <image>", "A"),
    }
    write_subset(root / "s", [row])
    (root / "s" / "a.jpg").write_bytes(jpeg(5))
    prepare_mantis(root, root, tmp_path / "out")
    [packed] = read_pass(make_loader(tmp_path / "out"))
    assert [int(item.float().mean().round()) for item in packed.media["image"].data] == [5, 7]


def test_result_depends_on_neither_jobs_nor_reruns(tmp_path: Path, source: Path):
    def files(out: Path) -> dict[str, bytes]:
        return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

    for form in Form:
        out = tmp_path / form
        prepare_mantis(source, source, out, form=form, jobs=1, val_fraction=0.6, shard_images=3)
        first = files(out)
        assert "val.jsonl" in first
        prepare_mantis(source, source, out, form=form, jobs=3, val_fraction=0.6, shard_images=3)
        assert files(out) == first
        shutil.rmtree(out)
        prepare_mantis(source, source, out, form=form, jobs=2, val_fraction=0.6, shard_images=3)
        assert files(out) == first


def test_limit_counts_rows_over_all_files(tmp_path: Path, source: Path):
    assert prepare_mantis(source, source, tmp_path / "out", limit=7).rows == 7


def test_unreadable_row_groups_are_dropped_and_counted(tmp_path: Path, source: Path):
    rows = [{"id": str(i), "images": [], "conversation": turns("Hi", f"answer {i} " * 50)} for i in range(60)]
    file = write_subset(tmp_path / "m" / "s", rows, row_group_size=20, compression="none", use_dictionary=False)
    metadata = pq.read_metadata(file)
    start = metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    file.write_bytes(content)
    report = prepare_mantis(tmp_path / "m", tmp_path / "m", tmp_path / "out")
    assert (report.rows, report.kept, report.dropped) == (60, 40, {"unreadable_file": 20})
    assert {row["id"] for row in kept_lines(tmp_path / "out")} == {f"s/{i}" for i in (*range(20), *range(40, 60))}


def test_one_value_that_is_no_text_costs_one_row(tmp_path: Path):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"0\xff2")])
    conversation = pa.array([turns("Hi", "Yo")] * 3)
    (tmp_path / "m" / "s").mkdir(parents=True)
    pq.write_table(pa.table({"id": bad, "conversation": conversation}), tmp_path / "m" / "s" / "t.parquet")
    report = prepare_mantis(tmp_path / "m", tmp_path / "m", tmp_path / "out")
    assert (report.rows, report.kept, report.dropped) == (3, 2, {"bad_row": 1})


def test_unusable_sources(tmp_path: Path, source: Path):
    with pytest.raises(DataError, match=r"no SUBSET/\*.parquet in it; it holds parquet files itself: name the folder"):
        prepare_mantis(source / "plain", source, tmp_path / "out")
    with pytest.raises(DataError, match=r"is not a folder"):
        prepare_mantis(tmp_path / "none", source, tmp_path / "out")
    file = source / "plain" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"is not a whole parquet file: .*; download it again, or move it away"):
        prepare_mantis(source, source, tmp_path / "out")
    file.unlink()
    archive = source / "zipped" / "train_images.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"train_images.zip cannot be unpacked .* download it again"):
        prepare_mantis(source, source, tmp_path / "out")
