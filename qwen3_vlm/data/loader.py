"""Rows of one data-parallel rank, pass by pass, with a position that any number of ranks and workers can take up.

Flow: `SampleSource` (numbered samples) -> `Sizes`, measured once at start -> `Pass` (the order of all rows) -> this
rank's `Share` of it -> worker processes -> rows.

The position is the pass and the number of rows that all ranks together have taken.
"""

import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from qwen3_vlm.config.schema import DataConfig
from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.order import Pass, Share, Sizes, draw_samples, pass_size, plan_pass
from qwen3_vlm.data.sample import PackedRow
from qwen3_vlm.data.source import SampleSource
from qwen3_vlm.data.task_encoder import ChatTaskEncoder
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import ConfigError, DataError
from qwen3_vlm.logging import get_logger
from qwen3_vlm.modality.base import Modality

log = get_logger(__name__)

STATE_VERSION = 2

Measured = NDArray[np.int32]
"""[n, 2] tokens and media items of neighbouring samples."""

SAMPLES_PER_CHUNK = 1000
"""Samples that a worker measures at a time."""


class RowLoader:
    """Streams packed rows: each sample exactly once a pass, over all ranks and workers.

    Args:
        config: conf/data.
        seq_length: tokens of a row.
        modalities: the run's modalities.
        tokenizer: for these modalities.
        seed: with the number of the pass, defines the order.
        share: which rows of a step are this rank's.
        gather: takes what this rank measured, returns that of all data-parallel ranks in their order.
        cache: file that keeps what was measured for the next start; None measures at every start.
        split: "train" is shuffled; any other ("val") comes in the order of the files.

    Raises:
        DataError: data.path is no data set, is not finished, lacks the split or a media folder, or is a weighted blend;
            a sample whose text cannot be used, under data.on_error=raise.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_length: int,
        modalities: Mapping[str, Modality],
        tokenizer: ChatTokenizer,
        seed: int,
        share: Share | None = None,
        gather: Callable[[Measured], Sequence[Measured]] = lambda mine: [mine],
        cache: Path | None = None,
        split: str = "train",
    ):
        self._config = config
        self._seq_length = seq_length
        self._seed = seed
        self._split = split
        self._share = share or Share()
        self._encoder = ChatTaskEncoder(chat=ChatEncoder(tokenizer, modalities), config=config, seq_length=seq_length)
        self._source = SampleSource(config.path, split=split, encoder=self._encoder)
        self._stream = {
            "data": self._source.fingerprint,
            "split": split,
            "seed": seed,
            "packing_buffer_size": config.packing_buffer_size,
            "pack": config.pack,
            "max_items_per_row": config.max_items_per_row,
            "bucket_by_items": config.bucket_by_items,
            "seq_length": seq_length,
            "tokenizer": tokenizer.fingerprint,
            "tokens_per_item": {name: modality.num_tokens for name, modality in modalities.items()},
        }
        measured = self._measure(gather, cache)
        self.sizes = Sizes(tokens=measured[:, 0].copy(), items=measured[:, 1].copy())
        """Of every sample of the source, by its number."""
        self._iterator: Iterator[PackedRow] | None = None
        self._steps: list[list[int]] = []
        self._epoch = self._row = 0
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """Passes completed: the number of times that `next_rows` has returned None."""
        return self._epoch

    @property
    def samples_per_pass(self) -> int:
        """Samples of one pass over all ranks, bad ones included."""
        return pass_size(self._source.sizes, self._source.repetitions)

    @property
    def rows_per_pass(self) -> int:
        """Rows of the current pass over all ranks; passes of a shuffled split differ by a few."""
        return len(self._pass)

    @property
    def fill(self) -> float:
        """Share of the current pass's row positions that hold tokens of samples, in 0..1."""
        tokens = int(self.sizes.tokens[self._pass.samples].sum(dtype=np.int64))
        return tokens / max(1, len(self._pass) * self._seq_length)

    def next_rows(self) -> list[PackedRow] | None:
        """This rank's rows of the next step, or None once at the end of a pass; the call after that begins the next.

        The last step of a pass may hold fewer rows, and none for some ranks; all ranks come to its end together. A row
        may hold no document, only skipped samples and padding.

        Raises:
            DataError: a bad sample, under data.on_error=raise; a file that was changed while the run reads it.
        """
        if self._row == len(self._pass):
            self._start_epoch(self._epoch + 1)
            return None
        if self._iterator is None:
            self._steps = self._share.rows(self._row, self._pass.totals(self.sizes.items))
            rows = _Rows(self._source, self._encoder, self._pass, self.sizes)
            self._iterator = iter(self._load(rows, [row for step in self._steps for row in step]))
        self._row = min(self._row + self._share.global_batch_size, len(self._pass))
        return [_next(self._iterator) for _ in self._steps.pop(0)]

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on all ranks: numbers, strings and dicts only, as JSON takes them."""
        return {
            "version": STATE_VERSION,
            "stream": self._stream,
            "epoch": self._epoch,
            "row": self._row,
            "order": self._pass.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position, whatever ranks, workers and batch sizes it was saved with.

        The rows after it are those that a loader that was never stopped would give.

        Args:
            state: a `state_dict` of a loader of the same data.

        Raises:
            ConfigError: the state is of another version, or of rows that other data, lengths or seeds have made.
        """
        if state["version"] != STATE_VERSION:
            raise ConfigError(f"data position has version {state['version']}, this code reads version {STATE_VERSION}")
        changed = [
            f"{name} was {state['stream'].get(name)}, is {value}"
            for name, value in self._stream.items()
            if state["stream"].get(name) != value
        ]
        if not changed:
            self._start_epoch(state["epoch"], state["row"])
            if self._pass.fingerprint != state["order"]:
                changed = ["the order of the rows is another one: rows of the data were changed, or the code has"]
        if changed:
            raise ConfigError(
                f"cannot resume in pass {state['epoch'] + 1}, behind row {state['row']}: samples would be repeated or "
                f"lost: {'; '.join(changed)}. Restore these settings, or start a new run from the checkpoint's weights "
                "(checkpoint.init_from)"
            )

    def close(self) -> None:
        """Stop the worker processes; the next row starts them again."""
        if self._iterator is not None and self._config.num_workers > 0:
            # By name: the iterator stands in reference cycles, and a later fork would inherit it and fail to free it.
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
        self._iterator = None

    def _start_epoch(self, epoch: int, row: int = 0) -> None:
        self.close()
        numbers = draw_samples(
            self._source.sizes,
            self._source.repetitions,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._split == "train",
        )
        self._pass = plan_pass(
            numbers,
            self.sizes,
            seq_length=self._seq_length,
            window=self._config.packing_buffer_size,
            pack=self._config.pack,
            max_items=self._config.max_items_per_row,
            bucket_by_items=self._config.bucket_by_items,
        )
        self._epoch = epoch
        self._row = row

    def _measure(self, gather: Callable[[Measured], Sequence[Measured]], cache: Path | None) -> Measured:
        """Sizes of all samples: from the cache if all ranks have it, else read by all ranks together."""
        measured_of = {name: self._stream[name] for name in ("split", "seq_length", "tokenizer", "tokens_per_item")}
        key = json.dumps(measured_of | {"files": self._source.version})
        kept = _read_cache(cache, key)
        have = gather(np.array([[kept is not None, 0]], np.int32))
        if kept is not None and all(part[0, 0] for part in have):
            log.info("sizes of %s samples of %s: %s", f"{len(kept):,}", self._split, cache)
            return kept
        started = time.perf_counter()
        chunks = _Chunks(self._source)
        ranks = self._share.dp_size
        iterator = iter(self._load(chunks, range(self._share.dp_rank, len(chunks), ranks)))
        mine = [_next(iterator) for _ in range(self._share.dp_rank, len(chunks), ranks)]
        measured = np.zeros((len(self._source), 2), np.int32)
        for rank, part in enumerate(gather(np.concatenate([np.empty((0, 2), np.int32), *mine]))):
            for chunk in range(rank, len(chunks), ranks):
                numbers = chunks.numbers(chunk)
                measured[numbers.start : numbers.stop], part = np.split(part, [len(numbers)])
        seconds = time.perf_counter() - started
        log.info("measured %s samples of %s in %.1f s", f"{len(measured):,}", self._split, seconds)
        if cache is not None and self._share.dp_rank == 0:
            partial = cache.with_name(f"{cache.name}.partial")
            with partial.open("wb") as file:
                np.savez(file, key=np.array(key), sizes=measured)
            partial.replace(cache)
        return measured

    def _load(self, dataset: "_Rows | _Chunks", numbers: Sequence[int]) -> DataLoader:
        workers = self._config.num_workers
        return DataLoader(
            dataset,
            sampler=numbers,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # torch would draw a seed for workers from the training's own random stream
        )


class _Rows(Dataset[PackedRow]):
    """The rows of a pass by number."""

    def __init__(self, source: SampleSource, encoder: ChatTaskEncoder, order: Pass, sizes: Sizes):
        self._source = source
        self._encoder = encoder
        self._pass = order
        self._tokens = sizes.tokens

    def __getitem__(self, row: int) -> PackedRow:
        numbers = self._pass.row(row)
        samples = self._source.read(numbers)
        for sample, number in zip(samples, numbers, strict=True):
            if len(sample) != self._tokens[number]:
                raise DataError(
                    f"sample {sample.key!r} has {len(sample)} tokens, it had {self._tokens[number]} when the run "
                    "started: its file was changed. Start the run again"
                )
        return self._encoder.pack_selected_samples([self._encoder.postencode_sample(sample) for sample in samples])


class _Chunks(Dataset[Measured]):
    """Sizes of neighbouring samples, a chunk at a time."""

    def __init__(self, source: SampleSource):
        self._source = source

    def __len__(self) -> int:
        return -(-len(self._source) // SAMPLES_PER_CHUNK)

    def numbers(self, chunk: int) -> range:
        """Sample numbers of a chunk."""
        return range(chunk * SAMPLES_PER_CHUNK, min((chunk + 1) * SAMPLES_PER_CHUNK, len(self._source)))

    def __getitem__(self, chunk: int) -> Measured:
        samples = self._source.read(self.numbers(chunk))
        return np.array([(len(s), sum(map(len, s.media_files.values()))) for s in samples], np.int32).reshape(-1, 2)


def _read_cache(cache: Path | None, key: str) -> Measured | None:
    if cache is None or not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as kept:
            return kept["sizes"] if kept["key"].item() == key else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is no file of sizes (%s): the samples are measured again", cache, error)
        return None


def _as_it_is(item: Any) -> Any:
    return item


def _next(iterator: Iterator[PackedRow]) -> PackedRow:
    try:
        return next(iterator)
    except DataError as error:  # from a worker, torch puts its own words and the whole traceback in front
        raise DataError(str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]) from error
