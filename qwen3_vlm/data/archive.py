"""Zip archives from outside, unpacked so that nothing leaves its folder and nothing is left out in silence.

Flow: list of entries -> one reason or none for each -> threads read, verify and write the good ones whole.
"""

import errno
import json
import os
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from qwen3_vlm.data.store import MAX_FILE_BYTES, check_name
from qwen3_vlm.errors import BadSample, DataError
from qwen3_vlm.logging import get_logger

log = get_logger(__name__)

MAX_RATIO = 200
"""Largest expansion of an entry of more than RATIO_FREE_BYTES; photographs expand by a few percent."""
RATIO_FREE_BYTES = 2**20
DONE = ".unpacked.json"
"""Written last into the target folder: what came out of which archive."""
SHOWN = 5
"""Refused entries that are named in the log; all of them are in DONE."""

_NAME_ERRORS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EINVAL, errno.ELOOP}


@dataclass(kw_only=True)
class Unpacked:
    """What an archive gave."""

    archive: str
    bytes: int
    """Size of the archive."""
    files: int = 0
    """Entries that lie in the target folder now."""
    refused: dict[str, int] = field(default_factory=dict)
    """Entries left out, by reason."""
    details: list[tuple[str, str, str]] = field(default_factory=list)
    """(entry, reason, detail) of each entry left out."""


def unpack_zip(archive: Path, target: Path, *, threads: int = 4) -> Unpacked:
    """Unpack an archive; a second call after an interruption goes on, one after the end returns at once.

    A folder that holds all entries and has the archive's name (train2017/ in train2017.zip) is left out of the names,
    so that target holds the files the same way whether the archive has such a folder or not.

    Args:
        archive: the zip.
        target: folder to write; files there are replaced unless they are what the archive holds.
        threads: files that are written at a time.

    Returns:
        Counts; refused for: outside_root (absolute, ..), bad_name, not_a_file (links, devices), encrypted,
        file_too_large, bomb (expands too much), repeated_name, corrupt_entry.

    Raises:
        DataError: the archive cannot be read at all, its entries overlap, or the disk is too small.
    """
    size = archive.stat().st_size if archive.is_file() else -1
    done = _read_done(target / DONE)
    if done is not None and (done.archive, done.bytes) == (archive.name, size):
        return done
    unpacked = Unpacked(archive=archive.name, bytes=size)
    try:
        with zipfile.ZipFile(archive) as opened:
            _unpack(opened, unpacked, target, threads)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, EOFError) as error:
        raise DataError(
            f"{archive} cannot be unpacked into {target}: {type(error).__name__}: {error}; if it is not a whole zip "
            "archive, download it again"
        ) from error
    unpacked.refused = dict(sorted(Counter(reason for _, reason, _ in unpacked.details).items()))
    if unpacked.details:
        examples = "; ".join(f"{name!r}: {reason}: {detail}" for name, reason, detail in unpacked.details[:SHOWN])
        log.warning("%s: %d entries refused %s: %s", archive, len(unpacked.details), unpacked.refused, examples)
    partial = target / f"{DONE}.partial"
    partial.write_text(json.dumps(asdict(unpacked), indent=1) + "\n")
    partial.replace(target / DONE)
    return unpacked


def _unpack(opened: zipfile.ZipFile, unpacked: Unpacked, target: Path, threads: int) -> None:
    # not is_dir(), which fails on an empty name
    entries = [entry for entry in opened.infolist() if not entry.filename.endswith("/")]
    packed_bytes = sum(entry.compress_size for entry in entries)
    if packed_bytes > unpacked.bytes:
        raise DataError(
            f"{unpacked.archive}: its entries claim {packed_bytes} packed bytes, the archive has {unpacked.bytes}: "
            "they overlap, which no honest archive does; nothing was unpacked"
        )
    good: list[zipfile.ZipInfo] = []
    for entry in entries:
        try:
            _check_entry(entry)
        except BadSample as bad:
            unpacked.details.append((_printable(entry.filename), bad.reason, _printable(bad.detail)))
        else:
            good.append(entry)
    prefix = _common_folder(good, Path(unpacked.archive).stem)
    names: dict[str, zipfile.ZipInfo] = {}
    for entry in good:
        name = entry.filename.removeprefix(prefix)
        if name in names or name.startswith(DONE):
            detail = "an earlier entry, or our own record, has this name"
            unpacked.details.append((_printable(entry.filename), "repeated_name", detail))
        else:
            names[name] = entry
    target.mkdir(parents=True, exist_ok=True)
    needed, free = sum(entry.file_size for entry in names.values()), shutil.disk_usage(target).free
    if needed > free + _present_bytes(names, target):
        raise DataError(f"{unpacked.archive} unpacks to {needed} bytes, {target} has {free} free")
    root = target.resolve()

    def write(number: int, name: str, entry: zipfile.ZipInfo) -> tuple[str, str, str] | None:
        try:
            _write_entry(opened, entry, root, name, root / f".{number}.partial")
        except BadSample as bad:
            return entry.filename, bad.reason, bad.detail
        return None

    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(names), unit=" files", disable=None) as bar:
        bar.set_description(unpacked.archive)
        items = list(names.items())
        for start in range(0, len(items), 1000):  # a bounded number of waiting tasks
            tasks = [pool.submit(write, start + i, *item) for i, item in enumerate(items[start : start + 1000])]
            refused = [task.result() for task in tasks]
            unpacked.details += [detail for detail in refused if detail is not None]
            unpacked.files += sum(detail is None for detail in refused)
            bar.update(len(tasks))


def _check_entry(entry: zipfile.ZipInfo) -> None:
    try:
        check_name(entry.filename)
    except BadSample as bad:
        raise BadSample("bad_name" if bad.reason == "bad_row" else bad.reason, bad.detail) from bad
    if not Path(entry.filename).parts:
        raise BadSample("bad_name", f"{entry.filename!r} names no file")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise BadSample("not_a_file", f"a link or device (mode {entry.external_attr >> 16:o})")
    if entry.flag_bits & 1:
        raise BadSample("encrypted", "needs a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadSample("corrupt_entry", f"compression {entry.compress_type}; only stored and deflated are read")
    if entry.file_size > MAX_FILE_BYTES:
        raise BadSample("file_too_large", f"{entry.file_size} bytes, at most {MAX_FILE_BYTES}")
    if entry.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * entry.compress_size):
        raise BadSample("bomb", f"{entry.compress_size} bytes unpack to {entry.file_size}")


def _write_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, root: Path, name: str, partial: Path) -> None:
    path = root / name
    try:
        if not path.parent.resolve().is_relative_to(root):
            raise BadSample("outside_root", "a folder of its name is a link out of the target folder")
        if _holds(path, entry):
            return
        with opened.open(entry) as stream:
            content = stream.read(entry.file_size)  # without a number it would inflate whatever is there; checks CRC
        if len(content) != entry.file_size:
            raise BadSample("corrupt_entry", f"{len(content)} bytes, its header says {entry.file_size}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in _NAME_ERRORS:
            raise
        raise BadSample("bad_name", f"cannot be written: {error.strerror}") from error
    except BadSample:
        raise
    # What zipfile raises on hostile entries: unknown compression, wrong lengths, broken streams, overlaps.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise BadSample("corrupt_entry", f"{type(error).__name__}: {error}") from error


def _holds(path: Path, entry: zipfile.ZipInfo) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.file_size:
        return False
    return zlib.crc32(path.read_bytes()) == entry.CRC


def _present_bytes(names: dict[str, zipfile.ZipInfo], target: Path) -> int:
    """Bytes that an interrupted call has written already; only looked at when the folder holds anything."""
    if not any(target.iterdir()):
        return 0
    return sum(entry.file_size for name, entry in names.items() if os.path.lexists(target / name))


def _common_folder(entries: Sequence[zipfile.ZipInfo], name: str) -> str:
    folder = f"{name}/"
    return folder if entries and all(entry.filename.startswith(folder) for entry in entries) else ""


def _printable(text: str) -> str:
    return text[:300].encode("utf-8", "backslashreplace").decode()


def _read_done(path: Path) -> Unpacked | None:
    if not path.is_file():
        return None
    try:
        return Unpacked(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a record of unpacked files ({error}); delete it to unpack again") from error
