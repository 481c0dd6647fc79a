"""Files that are read or written once, in order: the kernel is told to keep nothing of them.

A conversion goes once through more bytes than the machine may have memory. Left to itself the page cache fills up, and
every further page costs reclaiming another; here finished ranges are handed to the disk and forgotten as it goes
(docs/decisions/0008-streaming-conversion.md has the figures).
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

FORGET_EVERY_BYTES = 64 * 2**20


class UncachedFile(io.FileIO):
    """FileIO that forgets what it has read or written; `write` writes all that it is given."""

    _pending = 0

    def _count(self, num_bytes: int) -> None:
        self._pending += num_bytes
        if self._pending >= FORGET_EVERY_BYTES:
            self._pending = 0
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # starts writing what is not on the disk yet

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size."""
        count = super().readinto(buffer) or 0
        self._count(count)
        return count

    def write(self, data: Any) -> int:
        """Write all of it: one system call takes 2 GiB at most."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            count = super().write(view[done:]) or 0
            done += count
            self._count(count)
        return done


class UncachedFileSystem(FileSystem):
    """For torch's checkpoint reader and writer."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file of the checkpoint."""
        with UncachedFile(path, mode.replace("b", "")) as raw:
            yield io.BufferedReader(raw) if "r" in mode else raw
