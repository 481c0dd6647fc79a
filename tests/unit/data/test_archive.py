"""Archives: what is refused and why, nothing outside the folder, and calls that were interrupted."""

import io
import json
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from qwen3_vlm.data import archive
from qwen3_vlm.data.archive import unpack_zip
from qwen3_vlm.errors import DataError


def write(
    path: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in entries:
            out.writestr(name, content)
    return path


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def outside(tmp_path: Path, target: Path) -> list[Path]:
    return [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix == ".jpg" and not p.is_relative_to(target)]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refusals_by_reason(tmp_path: Path):
    path = write(
        tmp_path / "a.zip",
        [
            ("a/good.jpg", b"good"),
            ("a/deep/er/good.jpg", b"deep"),
            ("a/", b""),
            ("a/../../slip.jpg", b"x"),
            ("/abs.jpg", b"x"),
            (special("a/link.jpg", stat.S_IFLNK | 0o777), b"/etc/passwd"),
            (special("a/pipe.jpg", stat.S_IFIFO | 0o600), b""),
            ("a/good.jpg", b"again"),
            ("a/" + "n" * 300 + ".jpg", b"x"),
            ("a/good.jpg/below.jpg", b"x"),
        ],
    )
    target = tmp_path / "out"
    done = unpack_zip(path, target, threads=1)
    assert done.files == 2 and done.refused == {"bad_name": 2, "not_a_file": 2, "outside_root": 2, "repeated_name": 1}
    assert (target / "good.jpg").read_bytes() == b"good" and (target / "deep/er/good.jpg").read_bytes() == b"deep"
    assert not outside(tmp_path, target) and not list(target.rglob("*.partial"))
    assert {name for name, _, _ in json.loads((target / archive.DONE).read_text())["details"]} >= {"/abs.jpg"}


def test_broken_entries_cost_themselves_alone(tmp_path: Path):
    path = write(tmp_path / "a.zip", [(f"{i}.jpg", bytes([i]) * 500) for i in range(5)])
    content = bytearray(path.read_bytes())
    content[content.index(bytes([2]) * 400) + 10] ^= 1
    path.write_bytes(content)
    done = unpack_zip(path, tmp_path / "out")
    assert (done.files, done.refused) == (4, {"corrupt_entry": 1}) and not (tmp_path / "out" / "2.jpg").exists()


def test_an_entry_without_a_name(tmp_path: Path):
    path = write(tmp_path / "a.zip", [("n", b"x"), ("b.jpg", b"y")])
    content = path.read_bytes()  # the directory's entry: 28 bytes in, the length of the name
    at = content.index(b"PK\x01\x02") + 28
    path.write_bytes(content[:at] + b"\0\0\1\0" + content[at + 4 :])  # the byte of the name becomes extra data
    done = unpack_zip(path, tmp_path / "out")
    assert (done.files, sum(done.refused.values())) == (1, 1)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 20 * 2**20)
    entries = [("bomb.jpg", b"\0" * (5 * 2**20)), ("large.jpg", b"\0" * (21 * 2**20)), ("blank.jpg", b"\0" * 10**6)]
    done = unpack_zip(write(tmp_path / "a.zip", entries, zipfile.ZIP_DEFLATED), tmp_path / "out")
    assert (done.files, done.refused) == (1, {"bomb": 1, "file_too_large": 1})


def test_a_header_that_lies_about_the_size_does_not_inflate(tmp_path: Path):
    path = write(tmp_path / "a.zip", [("a.jpg", b"\0" * 10**6)], zipfile.ZIP_DEFLATED)
    content = path.read_bytes().replace(struct.pack("<I", 10**6), struct.pack("<I", 100))
    path.write_bytes(content)
    done = unpack_zip(path, tmp_path / "out")
    assert (done.files, done.refused) == (0, {"corrupt_entry": 1})


def test_entries_that_overlap_are_no_archive(tmp_path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("a.jpg", b"x" * 10**4)
        for i in range(50):
            twin = zipfile.ZipInfo(f"{i}.jpg")
            first = out.infolist()[0]
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.file_size = twin.compress_size = first.file_size
            out.filelist.append(twin)
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"they overlap"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "out")


def test_links_in_the_target_are_not_followed(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.jpg").write_bytes(b"kept")
    target = tmp_path / "out"
    target.mkdir()
    (target / "folder").symlink_to(tmp_path / "elsewhere")
    (target / "file.jpg").symlink_to(tmp_path / "elsewhere" / "kept.jpg")
    done = unpack_zip(write(tmp_path / "a.zip", [("folder/new.jpg", b"x"), ("file.jpg", b"y")]), target)
    assert (done.files, done.refused) == (1, {"outside_root": 1})
    assert [p.read_bytes() for p in (tmp_path / "elsewhere").iterdir()] == [b"kept"]
    assert not (target / "file.jpg").is_symlink() and (target / "file.jpg").read_bytes() == b"y"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip at all" * 100])
def test_what_is_no_archive_is_an_error(tmp_path: Path, content: bytes):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a.zip cannot be unpacked into .* download it again"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(DataError, match=r"none.zip cannot be unpacked"):
        unpack_zip(tmp_path / "none.zip", tmp_path / "out")


def test_an_interrupted_call_goes_on_and_mends_half_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.zip", [(f"a/{i}.jpg", bytes([i]) * 100) for i in range(4)])
    target = tmp_path / "out"
    unpack_zip(path, target)
    (target / archive.DONE).unlink()
    (target / "1.jpg").write_bytes(bytes([1]) * 50)  # cut short
    (target / "2.jpg").write_bytes(bytes([9]) * 100)  # of another archive
    untouched = (target / "3.jpg").stat().st_mtime_ns
    assert unpack_zip(path, target).files == 4
    assert [(target / f"{i}.jpg").read_bytes() for i in range(4)] == [bytes([i]) * 100 for i in range(4)]
    assert (target / "3.jpg").stat().st_mtime_ns == untouched
    monkeypatch.setattr(archive, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert unpack_zip(path, target).files == 4
