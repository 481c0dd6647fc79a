"""Rows of one data-parallel rank, pass by pass, with a position that can be saved and restored exactly.

Flow: data.path -> energon metadataset -> one source per leaf -> `ChatTaskEncoder` -> worker processes -> `RowLoader`.

Every pass (epoch) is a fresh energon pipeline, seeded by (seed, epoch): its order does not depend on the passes before
it, and the saved position is the epoch and energon's state within it.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Generator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from megatron.energon import (
    CrudeJsonlDatasetFactory,
    DefaultCrudeJsonlDatasetFactory,
    NoCachePool,
    SavableDataLoader,
    WorkerConfig,
    get_savable_loader,
    load_dataset,
)
from megatron.energon.epathlib import EPath
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset, LoadedDatasetList

from qwen3_vlm.config.schema import DataConfig
from qwen3_vlm.data.chat import ChatEncoder, parse_messages
from qwen3_vlm.data.sample import PackedRow
from qwen3_vlm.data.state import decode_state, encode_state
from qwen3_vlm.data.task_encoder import ChatTaskEncoder, EndOfPass
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import BadSample, ConfigError, DataError
from qwen3_vlm.modality.base import Modality

_log = logging.getLogger(__name__)

STATE_VERSION = 1

SAMPLES_PER_SLICE = 100
"""Samples that are read in file order: a pass shuffles slices of this size, and the buffer mixes the 16 open ones."""

SAMPLED_ROWS = 256
"""Rows from which the mean length of a sample is estimated."""

SECONDS_BETWEEN_WORKER_STATES = 10.0
"""A worker notes its position this often; after a restore it redoes at most this much work to reach the saved row."""


class RowLoader:
    """Streams packed rows: each sample exactly once a pass, over all ranks and workers.

    Args:
        config: conf/data.
        seq_length: tokens of a row.
        modalities: the run's modalities.
        tokenizer: for these modalities.
        dp_rank: this rank's number among dp_size data-parallel ranks; ranks of one dp_rank get the same rows.
        dp_size: data-parallel ranks.
        seed: with the epoch, defines the order.
        split: "train" is shuffled; any other ("val") comes in file order.

    Raises:
        DataError: data.path is no data set, is not finished, lacks the split or a media folder, or is a weighted blend.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_length: int,
        modalities: Mapping[str, Modality],
        tokenizer: ChatTokenizer,
        dp_rank: int,
        dp_size: int,
        seed: int,
        split: str = "train",
    ):
        self._config = config
        self._encoder = ChatTaskEncoder(
            chat=ChatEncoder(tokenizer, modalities), config=config, seq_length=seq_length, shuffle=split == "train"
        )
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._seed = seed
        self._split = split
        self._stream = {
            "data": _fingerprint(self._load(self._worker_config(epoch=0))),
            "split": split,
            "seed": seed,
            "dp_size": dp_size,
            "dp_rank": dp_rank,
            "num_workers": config.num_workers,
            "shuffle_buffer_size": config.shuffle_buffer_size,
            "packing_buffer_size": config.packing_buffer_size,
            "pack": config.pack,
            "seq_length": seq_length,
            "tokenizer": tokenizer.fingerprint,
            "tokens_per_item": {name: modality.num_tokens for name, modality in modalities.items()},
        }
        self._rows: Generator[PackedRow | EndOfPass, None, None] | None = None
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """Passes completed: the number of times that `next_row` has returned None."""
        return self._epoch

    def next_row(self) -> PackedRow | None:
        """The next row of this pass, or None once at its end; the call after that begins the next pass.

        A row may hold no document, only skipped samples and padding.

        Raises:
            DataError: a bad sample, under data.on_error=raise.
        """
        if self._rows is None:
            self._rows = iter(self._loader)
        while len(self._ended_workers) < max(1, self._config.num_workers):
            try:
                row = next(self._rows)
            except DataError as error:  # from a worker, torch puts its own words and the whole traceback in front
                raise DataError(str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]) from error
            if not isinstance(row, EndOfPass):
                return row
            self._ended_workers.add(row.worker_id)
        self._start_epoch(self._epoch + 1)
        return None

    def state_dict(self) -> dict[str, Any]:
        """This rank's position: dicts, lists, tuples, numbers, strings and tensors only.

        `torch.load(weights_only=True)` reads it without any safe-globals list.
        """
        return {
            "version": STATE_VERSION,
            "stream": self._stream,
            "epoch": self._epoch,
            "position": encode_state(self._loader.save_state_rank()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position: the rows after it equal those of a loader that was never stopped.

        Args:
            state: a `state_dict` of a loader of the same stream.

        Raises:
            ConfigError: the state is of another version or another stream (data, ranks, workers, buffers, ...).
        """
        if state["version"] != STATE_VERSION:
            raise ConfigError(f"data position has version {state['version']}, this code reads version {STATE_VERSION}")
        changed = [
            f"{name} was {state['stream'].get(name)}, is {value}"
            for name, value in self._stream.items()
            if state["stream"].get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"cannot resume at the saved data position, samples would be repeated or lost: {'; '.join(changed)}. "
                "Restore these settings, or start a new run from the checkpoint's weights (checkpoint.init_from)"
            )
        self._start_epoch(state["epoch"])
        position = decode_state(state["position"])
        self._loader.restore_state_rank(position)
        if position is not None and self._config.num_workers > 0:
            # energon 7.4.1 leaves out the offset: a second save before a worker's next row would repeat its rows.
            self._loader._worker_sample_counters = [
                last if worker.state is None else last + worker.offset
                for last, worker in zip(self._loader._worker_sample_counters, position.worker_states, strict=True)
            ]

    def close(self) -> None:
        """Stop the worker processes; the loader cannot be used afterwards."""
        if self._rows is not None:
            self._rows.close()
            # By name: the iterator stands in reference cycles, and a later fork would inherit it and fail to free it.
            if self._loader._iterator is not None:
                self._loader._iterator._shutdown_workers()
                self._loader._iterator = None
            self._rows = None

    def _start_epoch(self, epoch: int) -> None:
        self.close()
        self._epoch = epoch
        self._ended_workers: set[int] = set()
        self._loader = self._open(epoch)

    def _open(self, epoch: int) -> SavableDataLoader:
        worker_config = self._worker_config(epoch)
        loaded = self._load(worker_config)
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # energon prints the slices of every worker
            dataset = self._encoder.build_train_datasets(
                datasets=loaded.datasets,
                worker_config=worker_config,
                batch_size=None,
                shuffle_buffer_size=None,  # the encoder builds it
                blend_mode=loaded.blend_mode,
                repeat=False,
            )
        _log.debug("epoch %d: %s", epoch, printed.getvalue())
        loader = get_savable_loader(
            dataset,
            checkpoint_every_sec=SECONDS_BETWEEN_WORKER_STATES,
            cache_pool=NoCachePool(),
            watchdog_timeout_seconds=None,  # its thread only warns, and holds up closing a loader for seconds
            # Without workers, energon's collector would run in the training process, whose own policy rules there.
            gc_collect_every_n_steps=10 if self._config.num_workers > 0 else 0,
        )
        loader.pin_memory = False  # energon's pinning does not look into a PackedRow; it would only cost a thread
        return loader

    def _worker_config(self, epoch: int) -> WorkerConfig:
        digest = hashlib.sha256(f"{self._seed},{epoch}".encode()).digest()
        return WorkerConfig(
            rank=self._dp_rank,
            world_size=self._dp_size,
            num_workers=self._config.num_workers,
            seed_offset=int.from_bytes(digest[:6], "big"),
            global_error_handler=_stop,
            restore_error_handler=_stop,
        )

    def _load(self, worker_config: WorkerConfig) -> LoadedDatasetList:
        shuffled = self._split == "train"
        return load_leaves(
            self._config.path,
            split=self._split,
            worker_config=worker_config,
            max_samples_per_sequence=SAMPLES_PER_SLICE if shuffled else None,
            parallel_shard_iters=16 if shuffled else 1,
            shuffle_over_epochs_multiplier=1 if shuffled else None,
        )


def load_leaves(path: str, *, split: str, worker_config: WorkerConfig, **source_options: Any) -> LoadedDatasetList:
    """Open the data sets of one split.

    Args:
        path: a prepared folder or a metadataset YAML.
        split: its split.
        worker_config: ranks and workers.
        source_options: how leaves are sliced and shuffled.

    Raises:
        DataError: see `RowLoader`.
    """
    file = dataset_file(path)
    try:
        loaded = load_dataset(EPath(str(file))).get_datasets(
            training=True, split_part=split, worker_config=worker_config, **source_options
        )
    except (AssertionError, ValueError, TypeError, KeyError, OSError) as error:  # energon reports user errors as these
        raise DataError(f"{file}: cannot open split {split!r}: {type(error).__name__}: {error}") from error
    if loaded.blend_mode is DatasetBlendMode.DATASET_WEIGHT:
        raise DataError(
            f"{file}: split {split!r} is a weighted blend, which never ends and repeats samples at random; "
            "write blend_epochized with repetitions instead of blend with weights"
        )
    for leaf in loaded.datasets:
        leaf.dataset = _keep_lines_raw(leaf.dataset)
    return loaded


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


def mean_tokens(path: str, chat: ChatEncoder, seq_length: int) -> float | None:
    """Estimate the tokens that a training sample takes, from SAMPLED_ROWS evenly spaced rows.

    Args:
        path: a prepared folder, or a metadataset YAML.
        chat: encodes the rows as training does.
        seq_length: tokens of a row; a sample that is longer is skipped and counts as 0, as a broken one does.

    Returns:
        Mean over all samples, skipped ones included; None for a metadataset, whose rows this does not read.
    """
    report = read_report(path)
    if report is None:
        return None
    lengths = []
    with (Path(path) / "train.jsonl").open() as file:
        for line in islice(file, 0, None, max(1, report["train"] // SAMPLED_ROWS)):
            try:
                row = json.loads(line)
                counts = {name: len(names) for name, names in row["media"].items()}
                length = chat.encode_conversation(parse_messages(row["messages"]), counts).input_ids.numel()
            except (BadSample, json.JSONDecodeError, KeyError, TypeError, AttributeError):
                length = 0
            lengths.append(length if length <= seq_length else 0)
    return sum(lengths) / max(1, len(lengths))


def train_samples(path: str) -> int:
    """Samples in one pass over the training split, bad ones included.

    Raises:
        DataError: as `RowLoader`.
    """
    report = read_report(path)
    if report is not None:
        return report["train"]
    worker_config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    loaded = load_leaves(path, split="train", worker_config=worker_config)
    return sum(int(_leaf_samples(leaf) * (leaf.repetitions or 1)) for leaf in loaded.datasets)


def _leaf_samples(leaf: LoadedDataset) -> int:
    subset = getattr(leaf.dataset, "subset", None)
    start, end = subset.compute_subset(len(leaf.dataset)) if subset else (0, len(leaf.dataset))
    return end - start


def _keep_lines_raw(factory: Any) -> Any:
    """Leave JSON lines unparsed: energon's parser would turn a broken line into an exception before we can count it."""
    if type(factory) is not DefaultCrudeJsonlDatasetFactory:
        return factory
    raw = CrudeJsonlDatasetFactory(
        factory.path,
        training=factory.training,
        worker_config=factory.worker_config,
        shuffle_over_epochs=factory.shuffle_over_epochs,
        parallel_shard_iters=factory.parallel_shard_iters,
        max_samples_per_sequence=factory.max_samples_per_sequence,
        subset=factory.subset,
    )
    raw.subflavors = factory.subflavors
    return raw


def _fingerprint(loaded: LoadedDatasetList) -> str:
    """Hash of what defines the stream's samples: leaves in order, their share, and the length of every row.

    Folders may move; a row that changes its content but not its length goes unnoticed.
    """
    digest = hashlib.sha256()
    for leaf in loaded.datasets:
        subset = getattr(leaf.dataset, "subset", None)
        share = (len(leaf.dataset), leaf.weight, leaf.repetitions, subset.config() if subset else None)
        digest.update(repr(share).encode())
        for source in leaf.dataset.paths:
            for index in (EPath(f"{source}.idx"), EPath(str(source)) / ".nv-meta" / ".info.json"):
                if index.is_file():
                    digest.update(index.read_bytes())
    return digest.hexdigest()[:16]


def _stop(error: Exception, sample: object, sources: object) -> NoReturn:
    """energon's error handler: its default prints the error and drops the sample; ours stops the run."""
    raise error
