"""Where media bytes come from: names in data files are untrusted, so every read goes through a check.

    FolderStore     files of a local folder (`MediaFolder` reads them; preparation uses it too)
    ObjectStore     single objects below a prefix of an object store
    ShardStore      entries of indexed tar shards, local or in an object store

Faults of a single file are `BadSample`. What says nothing about the file (a lost connection, a refused login, a shard
that is gone or too short) is `DataError` and stops the run. Object stores are reached by the multi-storage client
that energon's paths (msc://PROFILE/...) bring; it and botocore repeat failed requests, as the profile says.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from megatron.energon import FileStore, SystemFileStore
from megatron.energon.cache.file_store import WebdatasetFileStore
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import split_name_re
from megatron.energon.source_info import SourceInfo
from multistorageclient import StorageClient
from multistorageclient.types import Range

from qwen3_vlm.data.chat import is_unicode
from qwen3_vlm.errors import BadSample, DataError

_Answer = TypeVar("_Answer")

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
                _check_size(name, os.fstat(file.fileno()).st_size)
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


class _Client:
    """The multi-storage client of a path's profile, opened by the process that asks.

    A path keeps the client of the process that made it. Forked processes that used it would share its open
    connections and get each other's answers.
    """

    def __init__(self, path: EPath):
        self._url = str(path)
        self._process: int | None = None

    def get(self) -> StorageClient:
        """The client of this process."""
        if self._process != os.getpid():
            self._fs = EPath(self._url).fs
            self._process = os.getpid()
        return self._fs


class ObjectStore(FileStore[bytes]):
    """Objects below one prefix of an object store, by name.

    Raises:
        DataError: there is nothing below the prefix, or the store cannot be reached.
    """

    def __init__(self, root: EPath):
        self._root = root
        self._client = _Client(root)
        if not _ask(EPath(str(root)).is_dir, f"cannot open the media folder {root}"):
            raise DataError(f"the media folder {root} does not exist or holds no object")

    def __getitem__(self, key: str) -> tuple[bytes, SourceInfo]:
        check_name(key)
        # Not EPath's "/": names such as msc://OTHER/x would leave the root.
        path = str(self._root.internal_path / key)

        def read() -> bytes:
            info = self._client.get().info(path)
            if info.type != "file":
                raise FileNotFoundError(path)
            _check_size(key, info.content_length)
            return bytes(self._client.get().read(path))

        try:
            content = _ask(read, f"cannot read {key!r} from {self._root}")
        except FileNotFoundError as error:
            raise BadSample("missing_file", f"no object {key!r} in {self._root}") from error
        return content, SourceInfo(dataset_path=self._root, index=key, shard_name=str(self._root), file_names=(key,))

    def get_path(self) -> str:
        return str(self._root)


class ShardStore(FileStore[bytes]):
    """Entries of tar shards, each read at its offset (energon's own store reads a remote shard whole for each entry).

    Args:
        inner: energon's store; its index says where entries lie.

    Raises:
        DataError: the index lists no entries (an early version of energon wrote it).
    """

    def __init__(self, inner: WebdatasetFileStore):
        self._inner = inner
        self._root = inner.base_path
        self._client = None if self._root.is_local() else _Client(self._root)
        if not inner.db_has_sample_parts:
            raise DataError(f"the index of {self._root} lists no entries: an early energon wrote it; prepare it again")

    def __getitem__(self, key: str) -> tuple[bytes, SourceInfo]:
        check_name(key)
        parts = split_name_re.match(key)  # energon indexes no name without a suffix
        try:
            if parts is None:
                raise KeyError(key)
            entry = self._inner.sqlite_reader.get_sample_part(*parts.groups())
        except KeyError as error:
            raise BadSample("missing_file", f"no entry {key!r} in {self._root}") from error
        _check_size(key, entry.raw_byte_size)
        shard = self._inner.tar_filepaths[entry.tar_file_id]
        failed = f"cannot read entry {key!r} from {shard}"
        try:
            content = _ask(lambda: self._read(shard, entry.raw_byte_offset, entry.raw_byte_size), failed)
        except FileNotFoundError as error:
            raise DataError(
                f"{failed}: the index names this shard, but it is not there; copy the whole folder again"
            ) from error
        if len(content) != entry.raw_byte_size:
            raise DataError(
                f"{failed}: found {len(content)} bytes, the index says {entry.raw_byte_size}: the shard is incomplete "
                "or the index belongs to another one; copy the whole folder again"
            )
        source = SourceInfo(dataset_path=self._root, index=key, shard_name=shard.name, file_names=(key,))
        return content, source

    def _read(self, shard: EPath, offset: int, size: int) -> bytes:
        if size == 0:  # a range of no bytes cannot be asked for
            return b""
        path = str(shard.internal_path)
        if self._client is not None:
            return bytes(self._client.get().read(path, byte_range=Range(offset, size)))
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            file.seek(offset)
            return file.read(size)

    def get_path(self) -> str:
        return str(self._root)


def checked_store(store: FileStore[bytes]) -> FileStore[bytes]:
    """Put the right check around a store that energon opened.

    Raises:
        DataError: it is a folder that does not exist (energon itself does not look), or see `ShardStore`.
    """
    if isinstance(store, WebdatasetFileStore):
        return ShardStore(store)
    if not isinstance(store, SystemFileStore) or store.base_dir is None:
        raise DataError(f"{store.get_path()} is a {type(store).__name__}, expected a folder or tar shards")
    path = store.base_dir
    return FolderStore(MediaFolder(path.local_path())) if path.is_local() else ObjectStore(path)


def _check_size(name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise BadSample("file_too_large", f"{name!r} has {size} bytes, at most {MAX_FILE_BYTES}")


def _ask(request: Callable[[], _Answer], failed: str) -> _Answer:
    """Ask a store. It may answer or say FileNotFoundError; everything else is a DataError."""
    try:
        return request()
    except (BadSample, FileNotFoundError):
        raise
    except Exception as error:  # stores have no common error, and none of theirs is a sample's fault
        raise DataError(
            f"{failed}: {type(error).__name__}: {error}. The client has given up after the tries that its profile "
            "allows (docs/data.md, Object stores). When the store answers again, the same command resumes the run"
        ) from error
