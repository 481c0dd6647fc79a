"""A conversion writes its output whole or leaves none."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3_vlm.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_or_nothing(folder: Path, num_bytes: int) -> Iterator[None]:
    """Remove `folder` if the block that writes it does not end well.

    A killed process cannot remove anything: the block must also write last what makes the folder look complete.

    Args:
        folder: what the block fills; made by the caller, and holding nothing else.
        num_bytes: what the block will write, nearly.

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
