"""The images of the kept rows as tar shards: each image once, in the order of first use, with energon's index.

    OUT/shards/shard-000000.tar, ...    entries 00000000.jpg, 00000001.png, ...
    OUT/shards/.nv-meta/                energon's index: an image is read at its offset, in any order

Rows stay in JSONL beside them: their text is measured at the start of a run without touching an image, and an image
that many rows share is stored once.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from megatron.energon import CrudeWebdataset
from megatron.energon.epathlib import EPath

from qwen3_vlm.data.prepare.pool import Task, run_tasks
from qwen3_vlm.data.store import MediaFolder
from qwen3_vlm.errors import BadSample
from qwen3_vlm.logging import get_logger

log = get_logger(__name__)

FOLDER = "shards"
_META = ".nv-meta"
_PLAIN_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


def entry_name(number: int, name: str) -> str:
    """Name of an image in the shards. Numbers keep energon's rules: no dot in the stem, one entry a key."""
    suffix = PurePosixPath(name).suffix.lower()
    return f"{number:08d}{suffix if _PLAIN_SUFFIX.fullmatch(suffix) else '.img'}"


def write_shards(images: Sequence[tuple[Path, str]], out: Path, *, size: int, jobs: int) -> dict[str, int]:
    """Write images as shards and index them; shards that an earlier run has finished stay.

    Args:
        images: (root, name) by number.
        out: the prepared folder.
        size: images of a shard.
        jobs: processes.

    Returns:
        Images that could not be read, by reason; they have no entry.
    """
    folder = out / FOLDER
    if not images:
        return {}
    folder.mkdir(exist_ok=True)
    results = [folder / f"shard-{i:06d}.json" for i in range(-(-len(images) // size))]

    def tasks() -> Iterator[Task]:
        for i, result in enumerate(results):
            count = min(size, len(images) - i * size)
            yield Task(name=result.stem, size=count, payload=None if result.is_file() else i)

    def work(i: int) -> None:
        numbers = range(i * size, min((i + 1) * size, len(images)))
        unreadable = _write_shard(results[i].with_suffix(".tar"), {n: images[n] for n in numbers})
        partial = results[i].with_suffix(".json.partial")
        partial.write_text(json.dumps(unreadable))
        partial.replace(results[i])

    for _ in run_tasks(tasks(), work, jobs=jobs, title="shards", unit=" images"):
        pass
    total: Counter[str] = Counter()
    for result in results:
        total.update(json.loads(result.read_text()))
    written = [path.name for path in (result.with_suffix(".tar") for result in results) if path.is_file()]
    if written:
        _build_index(folder, written)
    for result in results:
        result.unlink()
    return dict(sorted(total.items()))


def exist(out: Path) -> bool:
    """Whether a prepared folder has shards: a set of text alone has none."""
    return (out / FOLDER / _META).is_dir()


def remove(out: Path) -> None:
    """Remove the shards of an earlier preparation."""
    for file in (out / FOLDER).glob("shard-*"):
        file.unlink()
    shutil.rmtree(out / FOLDER / _META, ignore_errors=True)


def _write_shard(path: Path, images: dict[int, tuple[Path, str]]) -> dict[str, int]:
    unreadable: Counter[str] = Counter()
    folders = {root: MediaFolder(root) for root in {root for root, _ in images.values()}}
    partial = path.with_suffix(".tar.partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (root, name) in images.items():
            try:
                content = folders[root].read(name)
            except BadSample as bad:
                unreadable[bad.reason] += 1
                log.warning("image %r is left out of the shards: %s", name, bad)
                continue
            entry = tarfile.TarInfo(entry_name(number, name))  # no times, no owners: equal images, equal bytes
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    if sum(unreadable.values()) < len(images):
        partial.replace(path)
    else:
        partial.unlink()  # energon refuses empty shards
    return dict(unreadable)


def _build_index(folder: Path, names: Sequence[str]) -> None:
    shutil.rmtree(folder / _META, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):  # energon prints its progress
        CrudeWebdataset.prepare_dataset(
            EPath(folder),
            list(names),
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=1,  # more of them would write the index in the order they happen to finish
        )
    # energon marks each index with a random id; ours follows from the content, so that equal input gives equal bytes
    digest = hashlib.sha256((folder / _META / "index.sqlite").read_bytes()).digest()
    (folder / _META / "index.uuid").write_text(str(uuid.UUID(bytes=digest[:16])))
