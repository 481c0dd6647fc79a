"""A conversion writes its output whole or leaves none."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3_vlm.errors import ConfigError, DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


MARKER = ".unfinished_export"
"""Stands in a folder that an export fills, from its first file to its last: only such a folder is emptied."""


def place_of(out: Path) -> Path:
    """The folder to write an export into: OUT.partial, to be moved to OUT; OUT itself where there is an empty folder
    (it may be a mount point, or where the shell stands).

    Raises:
        ConfigError: OUT is taken, or OUT.partial is and not by an export; or neither can be made.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give a folder that does not exist or is empty")
    place = out if out.exists() else out.with_name(f"{out.name}.partial")
    try:
        if not place.is_dir():
            place.mkdir(parents=True)
        elif (place / MARKER).is_file():
            empty(place)  # of an export that was killed
        elif any(place.iterdir()):
            raise ConfigError(f"{place} exists and is not empty: choose another folder or remove it")
        (place / MARKER).touch()
    except OSError as e:
        raise ConfigError(f"{place} cannot be written: {e.strerror}. Choose another folder") from e
    return place


def finish(place: Path, out: Path) -> None:
    """The folder is complete."""
    (place / MARKER).unlink()
    if place != out:
        place.replace(out)


def empty(folder: Path) -> None:
    """Remove what a folder holds."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_file(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose findings it is for.

    Raises:
        ConfigError: its folder does not exist, or it is a folder itself.
    """
    if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise ConfigError(f"--json {path} cannot be written: give a file in a folder that exists and can be written")


@contextmanager
def whole_or_nothing(folder: Path, num_bytes: int, *, keep: bool) -> Iterator[None]:
    """Empty `folder` if the block that writes it does not end well.

    A killed process cannot remove anything: the block must also write last what makes the folder look complete.

    Args:
        folder: what the block fills; made by the caller, and holding nothing else.
        num_bytes: what the block will write, nearly.
        keep: leave the empty folder: it was there before.

    Raises:
        DiskFullError: there is too little room, now or in the end.
    """
    try:
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise DiskFullError(
                f"{folder} needs {num_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left: make room or "
                "choose another disk. Nothing was written."
            )
        yield
    except BaseException as e:
        if keep:
            empty(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        full = _disk_full(e)
        if full is None:
            raise
        raise DiskFullError(
            f"writing {folder} ({num_bytes / 1e9:.1f} GB) failed: {full.strerror}. What was written is removed; make "
            "room or choose another disk."
        ) from e


def _disk_full(error: BaseException | None) -> OSError | None:
    """The disk's error behind what was raised: torch.save answers it with a RuntimeError of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        error = error.__cause__ or error.__context__
    return None
