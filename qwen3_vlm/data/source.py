"""Prepared data as numbered samples: any of them can be read at any time, in any process.

Flow: data.path -> energon metadataset -> its leaves, each with energon's own reader, cooked and encoded by
`ChatTaskEncoder`. energon reads a sample by its restore key; here that is the usual way, not the exception.
"""

import bisect
import contextlib
import hashlib
import io
import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron.energon import (
    CrudeJsonlDatasetFactory,
    DefaultCrudeJsonlDatasetFactory,
    MapDataset,
    SavableDataset,
    WorkerConfig,
    load_dataset,
)
from megatron.energon.epathlib import EPath
from megatron.energon.local_copy import ensure_local_copy
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from multistorageclient.types import RetryableError

from qwen3_vlm.data.order import pass_size
from qwen3_vlm.data.sample import EncodedSample
from qwen3_vlm.data.task_encoder import ChatTaskEncoder
from qwen3_vlm.errors import DataError

_ALONE = WorkerConfig(rank=0, world_size=1, num_workers=0)
"""energon's readers see one process; who reads which sample is decided in front of them."""

_OPEN_ERRORS = (
    *(AssertionError, ValueError, TypeError, KeyError, OSError),  # energon reports user errors as these
    *(RuntimeError, RetryableError, ImportError),  # object stores; ImportError: boto3 is not installed
)


class SampleSource:
    """The samples of one split, numbered over its leaves in the order of the metadataset.

    Args:
        path: a prepared folder or a metadataset YAML.
        split: its split.
        encoder: cooks and encodes.

    Raises:
        DataError: path is no data set, is not finished, lacks the split or a media folder, or is a weighted blend.
    """

    def __init__(self, path: str, *, split: str, encoder: ChatTaskEncoder):
        self._encoder = encoder
        self._leaves = load_leaves(path, split=split)
        self._spans = [_span(leaf) for leaf in self._leaves]
        self.sizes = [len(span) for span in self._spans]
        """Samples of each leaf."""
        self.repetitions = [_repetitions(leaf) for leaf in self._leaves]
        """How often each leaf comes in a pass."""
        self.fingerprint = _fingerprint(self._leaves)
        """Hash of what defines the samples, wherever their files lie."""
        self.version = [self.fingerprint, *_modified(self._leaves)]
        """Changes with every change of a local file, also where the fingerprint does not."""
        self._ends = list(accumulate(self.sizes))
        self._process = -1
        self._datasets: list[SavableDataset[EncodedSample]] = []
        self._open()

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, numbers: Sequence[int]) -> list[EncodedSample]:
        """Read and encode samples; their media stay unread.

        Raises:
            DataError: a bad sample, under data.on_error=raise.
        """
        if self._process != os.getpid():  # worker processes would share the parent's file positions
            self._open()
        _ALONE.worker_activate(0)
        try:
            return [self._read(number) for number in numbers]
        finally:
            _ALONE.worker_deactivate()

    def _read(self, number: int) -> EncodedSample:
        leaf = bisect.bisect_right(self._ends, number)
        index = self._spans[leaf][number - self._ends[leaf]]  # counted from the leaf's end
        dataset = self._datasets[leaf]
        return dataset.restore_sample(_restore_key(dataset, index))

    def _open(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # energon prints the slices of every worker
            self._datasets = [self._encoder.open_leaf(leaf, worker_config=_ALONE) for leaf in self._leaves]
        self._process = os.getpid()


def _restore_key(dataset: SavableDataset, index: int) -> tuple[Any, ...]:
    """energon's key of a leaf's sample: one entry a map stage (with a count that seeds randomness; we have none)."""
    key: tuple[Any, ...] = ()
    while isinstance(dataset, MapDataset):
        key += ("MapDataset", 0)
        dataset = dataset.dataset
    return (*key, "Webdataset", index)


def load_leaves(path: str, *, split: str) -> list[LoadedDataset]:
    """Open the data sets of one split.

    Args:
        path: a prepared folder or a metadataset YAML.
        split: its split.

    Raises:
        DataError: see `SampleSource`.
    """
    file = dataset_file(path)
    try:
        loaded = load_dataset(EPath(str(file))).get_datasets(training=False, split_part=split, worker_config=_ALONE)
        for leaf in loaded.datasets:
            leaf.dataset = _keep_lines_raw(leaf.dataset)
    except _OPEN_ERRORS as error:
        said = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
        of_store = error.__cause__ or isinstance(error, (RuntimeError, RetryableError, PermissionError, ImportError))
        hint = ". If it lies in an object store: docs/data.md, Object stores" if of_store else ""
        raise DataError(f"{file}: cannot open split {split!r}: {said}{hint}") from error
    if loaded.blend_mode is DatasetBlendMode.DATASET_WEIGHT:
        raise DataError(
            f"{file}: split {split!r} is a weighted blend, which never ends and repeats samples at random; "
            "write blend_epochized with repetitions instead of blend with weights"
        )
    return loaded.datasets


def dataset_file(path: str) -> Path:
    """The metadataset YAML that data.path means.

    Raises:
        DataError: there is none, or the folder's preparation did not finish.
    """
    folder = Path(path)
    if folder.is_file() and folder.suffix in (".yaml", ".yml"):
        return folder
    if not folder.is_dir():
        raise DataError(f"data.path {path} is neither a prepared folder nor a metadataset YAML")
    if not (folder / "report.json").is_file():
        raise DataError(f"{path} has no report.json: its preparation did not finish; run tools/prepare_data.py again")
    return folder / "dataset.yaml"


def read_report(path: str) -> dict[str, Any] | None:
    """report.json of a prepared folder (rows, kept, images, dropped, train, val, ...), None for a metadataset YAML.

    Raises:
        DataError: as `dataset_file`.
    """
    file = dataset_file(path)
    return None if file == Path(path) else json.loads((file.parent / "report.json").read_text())


def train_samples(path: str) -> int:
    """Samples in one pass over the training split, bad ones included.

    Raises:
        DataError: as `SampleSource`.
    """
    report = read_report(path)
    if report is not None:
        return report["train"]
    leaves = load_leaves(path, split="train")
    return pass_size([len(_span(leaf)) for leaf in leaves], [_repetitions(leaf) for leaf in leaves])


def _span(leaf: LoadedDataset) -> range:
    """Row numbers of a leaf that belong to the split."""
    subset = getattr(leaf.dataset, "subset", None)
    return range(*subset.compute_subset(len(leaf.dataset))) if subset else range(len(leaf.dataset))


def _repetitions(leaf: LoadedDataset) -> float:
    """How often a leaf comes in a pass."""
    return float(leaf.repetitions or 1)


def _keep_lines_raw(factory: Any) -> Any:
    """Leave JSON lines unparsed: energon's parser would turn a broken line into an exception before we can count it."""
    if type(factory) is not DefaultCrudeJsonlDatasetFactory:
        return factory
    raw = CrudeJsonlDatasetFactory(
        _local_rows(factory.path), training=factory.training, worker_config=factory.worker_config, subset=factory.subset
    )
    raw.subflavors = factory.subflavors
    return raw


def _local_rows(path: EPath) -> EPath:
    """Rows of an object store as a copy that all processes of the machine share, with their index; local ones stay.

    energon would hold the whole file in the memory of every process.
    """
    if path.is_local():
        return path
    copies = {
        f"{path.name}{suffix}": ensure_local_copy(EPath(f"{path}{suffix}")).local_path() for suffix in ("", ".idx")
    }
    digest = hashlib.sha256(str(path).encode()).hexdigest()
    folder = copies[path.name].parent / f"{digest}.rows"  # the copies' own names are hashes; an index goes by its name
    folder.mkdir(exist_ok=True)
    for name, copy in copies.items():
        partial = folder / f"{name}.{os.getpid()}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(copy)
        partial.replace(folder / name)
    return EPath(folder / path.name)


def _fingerprint(leaves: Sequence[LoadedDataset]) -> str:
    """Hash of what defines the samples: leaves in order, their share, and the length of every row.

    Folders may move; a row that changes its content but not its length goes unnoticed.
    """
    digest = hashlib.sha256()
    for leaf in leaves:
        subset = getattr(leaf.dataset, "subset", None)
        share = (len(leaf.dataset), leaf.weight, leaf.repetitions, subset.config() if subset else None)
        digest.update(repr(share).encode())
        for source in leaf.dataset.paths:
            for index in (EPath(f"{source}.idx"), EPath(str(source)) / ".nv-meta" / ".info.json"):
                if index.is_file():
                    digest.update(index.read_bytes())
    return digest.hexdigest()[:16]


def _modified(leaves: Sequence[LoadedDataset]) -> list[int]:
    """When the leaves' rows were written last, in ns (copies have the time of the store)."""
    paths = [EPath(str(source)) for leaf in leaves for source in leaf.dataset.paths]
    return [path.local_path().stat().st_mtime_ns for path in paths if path.is_local()]
