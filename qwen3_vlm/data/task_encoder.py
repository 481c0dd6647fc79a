"""The energon TaskEncoder: prepared rows -> packed rows; methods stand in the order they run.

    build_cook_crude_sample   once: stores are checked and wrapped
    cook                      JSON line -> ChatSample (media not opened)
    build_encode_sample       once: one pass, then the shuffle buffer
    preencode_sample          ChatSample -> EncodedSample (tokens, length)
    select_samples_to_pack    a buffer of documents -> groups that fill a row
    postencode_sample         reads and decodes the media of one document
    pack_selected_samples     a group -> PackedRow
    build_batch               once: packing, then end marks

A bad sample is a value: the method that finds it returns it as skipped, and it travels on, with length 0, in the row
that it would have been in. energon's own error handling is never asked; whatever else is raised stops the run.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    FileStore,
    PackingDataset,
    SavableDataset,
    ShuffleBufferDataset,
    TaskEncoder,
    WorkerConfig,
    cooker,
    stateless,
)
from megatron.energon.cache import CachePool
from megatron.energon.wrappers.base import BaseWrapperDataset

from qwen3_vlm.config.schema import DataConfig, OnError
from qwen3_vlm.data.chat import ChatEncoder, is_unicode, parse_messages
from qwen3_vlm.data.packing import best_fit_decreasing, one_per_row, pack_row
from qwen3_vlm.data.sample import ChatSample, EncodedSample, MediaFile, PackedRow, SkippedSample
from qwen3_vlm.data.store import check_name, checked_store
from qwen3_vlm.errors import BadSample, DataError


@dataclass(frozen=True, kw_only=True)
class EndOfPass:
    """What a worker yields, again and again, once all its rows are out."""

    worker_id: int


class ChatTaskEncoder(TaskEncoder[ChatSample, EncodedSample, PackedRow, PackedRow]):
    """Turns prepared rows into packed rows.

    Args:
        chat: encodes conversations; brings tokenizer and modalities.
        config: packing, buffers and what a bad sample does.
        seq_length: tokens of a row; longer samples are skipped.
        shuffle: whether documents pass the shuffle buffer.
    """

    decoder = None  # stores give bytes; the modalities decode them

    def __init__(self, *, chat: ChatEncoder, config: DataConfig, seq_length: int, shuffle: bool):
        self.chat = chat
        self.config = config
        self.seq_length = seq_length
        self.shuffle = shuffle
        self.cookers = [Cooker(self.cook)]

    def build_cook_crude_sample(
        self, dataset: SavableDataset, *, aux: dict[str, FileStore] | None = None, **kwargs: Any
    ) -> SavableDataset[ChatSample]:
        """Put the checks of `store.py` around the data set's media stores.

        Raises:
            DataError: a media folder does not exist.
        """
        aux = {name: checked_store(store) for name, store in (aux or {}).items()}
        return super().build_cook_crude_sample(dataset, aux=aux, **kwargs)

    @stateless
    @cooker(need_cache=True)
    def cook(self, row: dict[str, Any], *, cache: CachePool, **stores: FileStore) -> ChatSample:
        """Read one prepared row: {"id": str, "messages": [{"role", "content"}], "media": {modality: [name]}}.

        Args:
            row: energon's crude sample; `json` holds the line's bytes.
            cache: makes media readable on demand.
            stores: media stores by modality.
        """
        key = f"{row['__shard__']}:{row['__key__']}"
        restore_key = row["__restore_key__"]
        try:
            fields = _load_row(row["json"])
            key = fields["id"]
            messages = parse_messages(fields.get("messages"))
            media_files = self._open_media(fields.get("media", {}), cache, stores)
        except BadSample as bad:
            skipped = self._skip(key, bad)
            return ChatSample(key=key, messages=[], media_files={}, skipped=skipped, __restore_key__=restore_key)
        return ChatSample(key=key, messages=messages, media_files=media_files, __restore_key__=restore_key)

    def _open_media(
        self, media: object, cache: CachePool, stores: Mapping[str, FileStore]
    ) -> dict[str, list[MediaFile]]:
        if not isinstance(media, dict):
            raise BadSample("bad_row", f"media is {type(media).__name__}, expected an object: modality -> names")
        files: dict[str, list[MediaFile]] = {}
        for modality, names in media.items():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise BadSample("bad_row", f"media.{modality} is not a list of names")
            if names and modality not in self.chat.modalities:
                known = ", ".join(self.chat.modalities) or "none"
                raise BadSample("bad_row", f"{len(names)} {modality} items, but the run's modalities are: {known}")
            if names and modality not in stores:
                raise BadSample("missing_file", f"{names[0]!r}: the data set names no store (aux) for {modality}")
            for name in names:
                check_name(name)
            files[modality] = [cache.get_lazy(stores[modality], name) for name in names]
        return files

    def build_encode_sample(
        self, dataset: SavableDataset[ChatSample], *, worker_config: WorkerConfig
    ) -> SavableDataset[EncodedSample]:
        """Close the source after one pass, then shuffle.

        The shuffle buffer is built here and not by energon, since the pass must be closed in front of it (see
        `OnePassDataset`).
        """
        dataset = OnePassDataset(dataset, worker_config=worker_config)
        if self.shuffle and self.config.shuffle_buffer_size > 1:
            dataset = ShuffleBufferDataset(dataset, size=self.config.shuffle_buffer_size, worker_config=worker_config)
        return super().build_encode_sample(dataset, worker_config=worker_config)

    @stateless
    def preencode_sample(self, sample: ChatSample) -> EncodedSample:
        """Encode the text and lay out the placeholders; media stay unread."""
        if sample.skipped is not None:
            return self._skipped(sample, sample.skipped)
        try:
            counts = {name: len(files) for name, files in sample.media_files.items()}
            tokens = self.chat.encode_conversation(sample.messages, counts)
            if tokens.input_ids.numel() > self.seq_length:
                raise BadSample("over_long", f"{tokens.input_ids.numel()} tokens, a row has {self.seq_length}")
        except BadSample as bad:
            return self._skipped(sample, self._skip(sample.key, bad))
        return EncodedSample(
            key=sample.key,
            input_ids=tokens.input_ids,
            is_target=tokens.is_target,
            media_positions=tokens.media_positions,
            media_files=sample.media_files,
            __restore_key__=sample.__restore_key__,
        )

    def select_samples_to_pack(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        """Group a buffer of documents into rows; every sample is in one group (energon drops what is in none)."""
        lengths = [len(sample) for sample in samples]
        groups = best_fit_decreasing(lengths, self.seq_length) if self.config.pack else one_per_row(lengths)
        return [[samples[i] for i in group] for group in groups]

    @stateless
    def postencode_sample(self, sample: EncodedSample) -> EncodedSample:
        """Read and decode the media of a document that was chosen for a row."""
        if sample.skipped is not None:
            return sample
        try:
            for name, modality in self.chat.modalities.items():
                items = [modality.preprocess(file.get()) for file in sample.media_files.get(name, [])]
                none = torch.empty((0, *modality.media_shape), dtype=modality.media_dtype)
                sample.media[name] = torch.stack(items) if items else none
        except BadSample as bad:
            return self._skipped(sample, self._skip(sample.key, bad))
        return sample

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> PackedRow:
        """Lay the documents of one group end to end."""
        return pack_row(
            samples,
            seq_length=self.seq_length,
            pad_id=self.chat.tokenizer.pad_id,
            modalities=self.chat.modalities,
        )

    def build_batch(
        self, dataset: SavableDataset[EncodedSample], *, worker_config: WorkerConfig, **_: Any
    ) -> SavableDataset[PackedRow | EndOfPass]:
        """Pack, then mark the end; micro batches are joined in the training process (`collate_rows`)."""
        dataset = _QuietPackingDataset(
            dataset,
            buffer_size=self.config.packing_buffer_size,
            pre_packer=self.select_samples_to_pack,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            sample_encoder=self.postencode_sample,
            sample_encoder_stateless=True,
            worker_config=worker_config,
        )
        return EndMarkedDataset(dataset, worker_config=worker_config)

    def _skip(self, key: str, bad: BadSample) -> SkippedSample:
        if self.config.on_error is OnError.raise_:
            # One plain string, so that torch can rebuild it from a worker process under its own type.
            raise DataError(f"sample {key!r}: {bad} (data.on_error=raise stops at the first bad sample)") from bad
        return SkippedSample(key=key, reason=bad.reason, detail=bad.detail)

    def _skipped(self, sample: ChatSample | EncodedSample, skipped: SkippedSample) -> EncodedSample:
        return EncodedSample(
            key=sample.key,
            input_ids=torch.empty(0, dtype=torch.int64),
            is_target=torch.empty(0, dtype=torch.bool),
            media_positions={},
            media_files={},
            skipped=skipped,
            __restore_key__=sample.__restore_key__,
        )


class OnePassDataset(BaseWrapperDataset[ChatSample, ChatSample]):
    """Yields its source once, also if it is saved and restored after the source has ended.

    energon's sources start over when they are iterated after their end. While buffers behind a finished source drain
    (the whole epoch, in a small data set), a restored pipeline would therefore read the epoch's samples again.
    """

    _savable_fields = ("_ended",)

    def __init__(self, dataset: SavableDataset[ChatSample], *, worker_config: WorkerConfig):
        super().__init__(dataset, worker_config=worker_config)
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._ended = False

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[ChatSample]:
        if not self._ended and self.dataset.worker_has_samples():
            yield from self.dataset
        self._ended = True

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}


class EndMarkedDataset(BaseWrapperDataset[PackedRow, PackedRow | EndOfPass]):
    """Yields its source's rows, then end marks for ever.

    A worker whose iterator ends is lost to energon's save and restore: its last state belongs to the next pass, and
    skipping ahead to a position runs over into it. In an endless stream no iterator ends; `RowLoader` counts marks.
    """

    def reset_state_own(self) -> None:
        """Nothing to reset: after a restore the drained source yields nothing, and the marks follow at once."""

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[PackedRow | EndOfPass]:
        yield from self.dataset
        while True:
            yield EndOfPass(worker_id=self.worker_config.rank_worker_id())

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}


class _QuietPackingDataset(PackingDataset):
    """energon's packing without the progress bar that every worker would print while it fills its first buffer."""

    def _fill_reading_buffer(self, source_iter: Iterator, log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter, log_progress=False)


def _load_row(line: bytes | str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_row", f"not valid JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("id"), str) or not is_unicode(fields["id"]):
        raise BadSample("bad_row", "not an object with a string id")
    return fields
