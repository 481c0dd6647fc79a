"""Where media bytes come from: names in data files are untrusted, so every read goes through a check.

`MediaFolder` knows one folder and plain files (preparation uses it too); `FolderStore` and `CheckedStore` put it, or
any other energon store, behind energon's interface. All faults of a single file are `BadSample`.
"""

import os
import stat
from pathlib import Path, PurePosixPath

from megatron.energon import FileStore, SystemFileStore
from megatron.energon.epathlib import EPath
from megatron.energon.source_info import SourceInfo

from qwen3_vlm.data.chat import is_unicode
from qwen3_vlm.errors import BadSample, DataError

MAX_FILE_BYTES = 256 * 2**20
"""Largest media file that is read, in bytes; real photographs are a hundredth of it."""


def check_name(name: str) -> None:
    """Refuse names that could leave a root: absolute ones, ones with "..", and ones that are no file name at all.

    Raises:
        BadSample: outside_root, or bad_row for a name that is not valid Unicode.
    """
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise BadSample("outside_root", f"media name {name!r} is not a path below the media root")
    if not is_unicode(name):
        raise BadSample("bad_row", f"media name {name!r} is not valid Unicode")


class MediaFolder:
    """Files below one folder; nothing outside of it can be read, by name or by symbolic link.

    Args:
        root: the folder (it may itself be a symbolic link).

    Raises:
        DataError: it does not exist.
    """

    def __init__(self, root: str | Path):
        if not Path(root).is_dir():
            raise DataError(f"the media folder {root} does not exist or is not a folder")
        self.root = Path(root).resolve()
        self._root = str(self.root)

    def locate(self, name: str) -> str:
        """Resolve a name to the path of an existing regular file.

        Raises:
            BadSample: outside_root, missing_file, or unreadable_file (too long a name, a loop of links, no permission).
        """
        check_name(name)
        try:
            # os.path, since this runs for every image: pathlib takes three times as long.
            path = os.path.realpath(f"{self._root}/{name}")
            is_file = stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            is_file = False
        except OSError as error:
            raise self._unreadable(name, error) from error
        if os.path.commonpath([self._root, path]) != self._root:
            raise BadSample("outside_root", f"{name!r} is a link to {path}, which is outside {self.root}")
        if not is_file:
            raise BadSample("missing_file", f"no file {name!r} in {self.root}")
        return path

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            BadSample: outside_root, missing_file, unreadable_file (no permission, a failing disk) or
                file_too_large (MAX_FILE_BYTES).
        """
        path = self.locate(name)
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise BadSample("file_too_large", f"{name!r} has {size} bytes, at most {MAX_FILE_BYTES}")
                return file.read()
        except OSError as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> BadSample:
        short = name if len(name) <= 200 else f"{name[:200]}... ({len(name)} characters)"
        return BadSample("unreadable_file", f"{short!r} in {self.root}: {type(error).__name__}: {str(error)[:200]}")


class FolderStore(FileStore[bytes]):
    """A `MediaFolder` as an energon store."""

    def __init__(self, folder: MediaFolder):
        self.folder = folder
        self._path = EPath(self.get_path())

    def __getitem__(self, key: str) -> tuple[bytes, SourceInfo]:
        source = SourceInfo(dataset_path=self._path, index=key, shard_name=self.get_path(), file_names=(key,))
        return self.folder.read(key), source

    def get_path(self) -> str:
        return str(self.folder.root)


class CheckedStore(FileStore[bytes]):
    """Any other energon store (tar shards, object stores), with names checked and missing entries as `BadSample`."""

    def __init__(self, inner: FileStore[bytes]):
        self.inner = inner

    def __getitem__(self, key: str) -> tuple[bytes, SourceInfo]:
        check_name(key)
        try:
            return self.inner[key]
        except (KeyError, FileNotFoundError, ValueError) as error:  # ValueError: a name without a suffix
            raise BadSample("missing_file", f"no entry {key!r} in {self.get_path()}") from error

    def get_path(self) -> str:
        return self.inner.get_path()


def checked_store(store: FileStore[bytes]) -> FileStore[bytes]:
    """Put the right check around a store that energon opened.

    Raises:
        DataError: it is a local folder that does not exist (energon itself does not look).
    """
    path = EPath(store.get_path())
    is_folder = isinstance(store, SystemFileStore) and path.is_local()
    return FolderStore(MediaFolder(path.local_path())) if is_folder else CheckedStore(store)
