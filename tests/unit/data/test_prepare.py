"""Preparation: planted errors and known counts, stable split, unfinished folders, and the command line."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.prepare import Form, prepare_llava
from qwen3_vlm.data.prepare.llava import find_source, iter_texts
from qwen3_vlm.data.prepare.report import Histogram
from qwen3_vlm.data.sample import Message
from qwen3_vlm.data.source import read_report, train_samples
from qwen3_vlm.errors import DataError
from tests.unit.data.cases import jpeg, read_pass

ROOT = Path(__file__).parents[3]


def llava(
    key: object, image: object = "a.jpg", human: str = "<image>\nDescribe.", gpt: str = "A cat."
) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": key, "image": image, "conversations": turns} if image else {"id": key, "conversations": turns}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        (folder / name).write_bytes(jpeg(9))
    (tmp_path / "outside.jpg").write_bytes(jpeg(1))
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    return folder


def planted() -> tuple[list[Any], dict[str, int]]:
    good = [llava("1"), llava("2", ["a.jpg", "sub/b.jpg"], "<image> and <image>?"), llava(3, None, "Hi"), llava("1")]
    bad = [
        llava("p1", None, "<image>"),
        llava("p2", ["a.jpg", "a.jpg"]),
        llava("m", "gone.jpg"),
        llava("o1", "../outside.jpg"),
        llava("o2", "/etc/passwd"),
        llava("o3", "link.jpg"),
        llava("u1", "y" * 5000 + ".jpg"),
        llava("z", "a.jpg") | {"image": 0},
        {"id": "e", "conversations": []},
        llava("e2", gpt=" "),
        {"id": "f"},
        llava("g", {"path": "a.jpg"}),
        {"id": "h", "conversations": [{"from": "cat", "value": "miau"}]},
        "text",
        None,
    ]
    dropped = {
        "bad_row": 6,
        "empty_conversation": 2,
        "missing_file": 1,
        "outside_root": 3,
        "placeholder_mismatch": 2,
        "unreadable_file": 1,
    }
    return good + bad, dropped


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_counts_and_rows(tmp_path: Path, images: Path, make_loader: Callable[..., RowLoader], form: str):
    rows, dropped = planted()
    source = tmp_path / f"source.{form}"
    lines = [json.dumps(row) for row in rows]
    source.write_text("[" + ",\n ".join(lines) + "]" if form == "json" else "\n".join([*lines[:-1], "{broken", ""]))
    out = tmp_path / "out"
    report = prepare_llava(source, images, out)
    assert report.dropped == dropped and report.rows == len(rows) == report.kept + sum(dropped.values())
    assert (report.kept, report.images, report.train, report.val) == (4, 4, 4, 0)
    assert report.train_images == 4 and report.train_characters == len("\nDescribe.A cat.") * 2 + len(
        " and ?A cat.HiA cat."
    )
    assert read_report(str(out)) == json.loads((out / "report.json").read_text())
    assert train_samples(str(out)) == 4
    written = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == ["1", "2", "3", "1#2"]
    assert written[1]["media"] == {"image": ["a.jpg", "sub/b.jpg"]} and written[2]["media"] == {"image": []}
    assert written[0]["messages"] == [
        {"role": "user", "content": "<image>\nDescribe."},
        {"role": "assistant", "content": "A cat."},
    ]
    streamed = read_pass(make_loader(out))
    assert sorted(key for row in streamed for key in row.keys) == ["1", "1#2", "2", "3"]
    assert not any(row.skipped for row in streamed)


def test_validation_split_is_stable_by_key(tmp_path: Path, images: Path, make_loader: Callable[..., RowLoader]):
    def split(rows: list[Any], name: str) -> tuple[list[str], list[str]]:
        source, out = tmp_path / f"{name}.json", tmp_path / name
        source.write_text(json.dumps(rows))
        prepare_llava(source, images, out, val_fraction=0.25)
        lines = [(out / f"{part}.jsonl").read_text().splitlines() for part in ("train", "val")]
        return tuple([json.loads(line)["id"] for line in part] for part in lines)

    rows = [llava(f"k{i}") for i in range(200)]
    train, val = split(rows, "all")
    assert 30 < len(val) < 70 and len(train) + len(val) == 200
    fewer_train, fewer_val = split(rows[::-2], "fewer")
    assert set(fewer_train) <= set(train) and set(fewer_val) <= set(val)
    validation = read_pass(make_loader(tmp_path / "all", split="val"))
    assert sorted(key for row in validation for key in row.keys) == sorted(val)


def test_repeated_preparation_replaces_and_is_deterministic(tmp_path: Path, images: Path):
    source, out = tmp_path / "s.json", tmp_path / "out"
    source.write_text(json.dumps([llava(f"k{i}") for i in range(20)]))
    prepare_llava(source, images, out, val_fraction=0.5)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    prepare_llava(source, images, out, val_fraction=0.5)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert not any(name.endswith(".partial") for name in first)
    prepare_llava(source, images, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.yaml",
        "dropped.jsonl",
        "report.json",
        "report.png",
        "train.jsonl",
        "train.jsonl.idx",
    ]


def test_killed_preparation_does_not_look_complete(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
    source, out = tmp_path / "s.json", tmp_path / "out"
    source.write_text(json.dumps([llava("1")]))
    prepare_llava(source, images, out)
    monkeypatch.setattr("qwen3_vlm.data.prepare.run._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_llava(source, images, out)
    with pytest.raises(DataError, match=r"did not finish"):
        train_samples(str(out))


def test_unusable_sources(tmp_path: Path, images: Path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"does not exist"):
        prepare_llava(tmp_path / "none.json", images, out)
    with pytest.raises(DataError, match=r"media folder .* does not exist"):
        prepare_llava(tmp_path, tmp_path / "none", out)
    source = tmp_path / "s.json"
    source.write_text(json.dumps([llava("1", "gone.jpg")]))
    with pytest.raises(DataError, match=r"of 1 rows none is left for training \(dropped: {'missing_file': 1}\)"):
        prepare_llava(source, images, out)
    with pytest.raises(DataError, match=r"val_fraction is 1"):
        prepare_llava(source, images, out, val_fraction=1)
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(DataError, match=r"found s.json, t.json; name the file itself"):
        find_source(tmp_path)
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text("[]")
    assert find_source(tmp_path).name == "blip_laion_cc_sbu_558k.json"
    (tmp_path / "t.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"t.json is not a JSON list: .*utf-8"):
        prepare_llava(tmp_path / "t.json", images, out)


@pytest.mark.parametrize("text", ["", "{}", "[1", "[1,", "[1 2]", "[nul]", "[1"])
def test_broken_json_lists(tmp_path: Path, text: str):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(DataError, match=r"s.json is not a JSON list"):
        list(iter_texts(tmp_path / "s.json"))


@pytest.mark.parametrize("rows", [[], [1], [{"a": [1, "]"]}, None, "x,y"]])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists(tmp_path: Path, rows: list, indent: int | None):
    (tmp_path / "s.json").write_text("\n " + json.dumps(rows, indent=indent) + "\n")
    assert [json.loads(text) for text in iter_texts(tmp_path / "s.json")] == rows


def test_command_line(tmp_path: Path, images: Path):
    source, out = tmp_path / "s.json", tmp_path / "out"
    source.write_text(json.dumps(planted()[0]))
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), "llava-pretrain", "--source", str(source)]
    command += ["--images", str(images), "--out"]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "report.json").read_text())
    failed = subprocess.run([*command, str(out), "--val-fraction", "2"], capture_output=True, text=True)
    assert (
        failed.returncode == 1 and failed.stderr.strip() == "error: val_fraction is 2.0, expected 0 <= val_fraction < 1"
    )


def test_mix_of_several_image_folders_and_text(tmp_path: Path, images: Path, make_loader: Callable[..., RowLoader]):
    """The 665K mix: names are relative to the folder that holds coco/, gqa/, ...; some rows are text alone."""
    names = ["coco/train2017/000000000009.jpg", "gqa/images/1.jpg", "ocr_vqa/images/2.jpg", "vg/VG_100K/3.jpg"]
    for i, name in enumerate(names):
        (images / name).parent.mkdir(parents=True)
        (images / name).write_bytes(jpeg(10 * i))
    rows = [llava(f"r{i}", name) for i, name in enumerate(names)] + [llava("text", None, "Hi", "Yo")]
    source = tmp_path / "llava_v1_5_mix665k.json"
    source.write_text("\ufeff" + json.dumps(rows))
    report = prepare_llava(source, images, tmp_path / "out", jobs=2)
    assert (report.kept, report.images, report.dropped) == (5, 4, {})
    streamed = read_pass(make_loader(tmp_path / "out"))
    seen = sorted(int(item.float().mean().round()) for row in streamed for item in row.media["image"].data)
    assert seen == [0, 10, 20, 30] and sum(len(row.keys) for row in streamed) == 5


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_images_in_a_zip(tmp_path: Path, make_loader: Callable[..., RowLoader], prefix: str):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(f"{prefix}00453/1.jpg", jpeg(40))
        archive.writestr(f"{prefix}../../slip.jpg", jpeg(41))
    source, out = tmp_path / "rows.json", tmp_path / "out"
    source.write_text(json.dumps([llava("1", "00453/1.jpg"), llava("2", "00453/2.jpg")]))
    report = prepare_llava(source, tmp_path / "images.zip", out)
    assert (report.kept, report.dropped) == (1, {"missing_file": 1})
    assert report.archives == {"images.zip": {"outside_root": 1}} and not list(tmp_path.rglob("slip.jpg"))
    out.rename(tmp_path / "moved")  # the images are inside
    [row] = read_pass(make_loader(tmp_path / "moved"))
    assert row.keys == ["1"] and int(row.media["image"].data.float().mean().round()) == 40


def test_tar_shards_hold_each_image_once_and_say_what_cannot_be_read(
    tmp_path: Path, images: Path, make_loader: Callable[..., RowLoader], monkeypatch: pytest.MonkeyPatch
):
    (images / "huge.bmp").write_bytes(b"x" * 20_000)
    monkeypatch.setattr("qwen3_vlm.data.store.MAX_FILE_BYTES", 10_000)
    rows = [llava(f"r{i}", "a.jpg" if i % 2 else "sub/b.jpg") for i in range(30)] + [llava("h", "huge.bmp")]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    report = prepare_llava(tmp_path / "s.json", images, tmp_path / "out", form=Form.tar, shard_images=2)
    assert (report.kept, report.form, report.unreadable_images) == (31, "tar", {"file_too_large": 1})
    entries = []
    for shard in sorted((tmp_path / "out" / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            entries.append(tar.getnames())
    assert entries == [["00000000.jpg", "00000001.jpg"]]  # the second would be empty
    images.rename(tmp_path / "gone")  # the shards are enough
    streamed = read_pass(make_loader(tmp_path / "out"))
    assert sum(len(row.keys) for row in streamed) == 30
    assert [(s.key, s.reason) for row in streamed for s in row.skipped] == [("h", "missing_file")]


def test_tar_form_of_text_alone(tmp_path: Path, images: Path, make_loader: Callable[..., RowLoader]):
    (tmp_path / "s.json").write_text(json.dumps([llava("t", None, "Hi")]))
    prepare_llava(tmp_path / "s.json", images, tmp_path / "out", form=Form.tar)
    assert not (tmp_path / "out" / "shards").exists()
    assert read_pass(make_loader(tmp_path / "out"))[0].keys == ["t"]


def test_lengths_in_tokens_are_those_of_training(
    tmp_path: Path, images: Path, chat: ChatEncoder, make_loader: Callable[..., RowLoader]
):
    def measure(messages: Any, num_images: int) -> int:
        return chat.encode_conversation([Message(**m) for m in messages], {"image": num_images}).input_ids.numel()

    rows = [llava("1"), llava("2", ["a.jpg", "sub/b.jpg"], "<image> and <image>?"), llava("3", None, "Hi")]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    report = prepare_llava(tmp_path / "s.json", images, tmp_path / "out", measure=measure, measured_by="test")
    tokens = make_loader(tmp_path / "out").sizes.tokens
    assert report.length.unit == "tokens" and report.length.largest == tokens.max()
    assert report.length.mean == round(float(tokens.mean()), 2) and sum(report.length.rows.values()) == 3
    assert prepare_llava(tmp_path / "s.json", images, tmp_path / "out").length.unit == "characters"


def test_a_worker_that_dies_is_an_error(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "s.json").write_text(json.dumps([llava("1")]))
    monkeypatch.setattr("qwen3_vlm.data.prepare.llava.LlavaReader.read", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(DataError, match=r"a worker process died at or before s.json from row 0"):
        prepare_llava(tmp_path / "s.json", images, tmp_path / "out")


def test_histogram_bins():
    by_power = Histogram.of({0: 1, 1: 2, 3: 4, 4: 8, 7: 16}, unit="tokens", by_power=True)
    assert by_power.rows == {"0": 1, "1": 2, "2-3": 4, "4-7": 24} and by_power.largest == 7
    assert by_power.mean == round((2 + 12 + 32 + 112) / 31, 2)
