"""The energon TaskEncoder: prepared rows -> packed rows; methods stand in the order they run.

    open_leaf                 once a process: energon's reader, cook and preencode_sample as one data set
    cook                      JSON line -> ChatSample (media not opened)
    preencode_sample          ChatSample -> EncodedSample (tokens, length)
    postencode_sample         reads and decodes the media of one document
    pack_selected_samples     the documents of a row -> PackedRow

Which documents make a row is decided for the whole pass (`order.py`), not from a buffer in each worker.

A bad sample is a value: the method that finds it returns it as skipped, and it travels on, with length 0, in the row
that it would have been in. energon's own error handling is never asked; whatever else is raised stops the run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.energon import Cooker, FileStore, MapDataset, SavableDataset, TaskEncoder, WorkerConfig, stateless
from megatron.energon.metadataset.loader_interface import LoadedDataset

from qwen3_vlm.config.schema import DataConfig, OnError
from qwen3_vlm.data.chat import ChatEncoder, is_unicode, parse_messages
from qwen3_vlm.data.packing import pack_row
from qwen3_vlm.data.sample import ChatSample, EncodedSample, MediaFile, PackedRow, SkippedSample
from qwen3_vlm.data.store import check_name, checked_store
from qwen3_vlm.errors import BadSample, DataError


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One media file in an energon store."""

    store: FileStore[bytes]
    name: str

    def get(self) -> bytes:
        """Read the file.

        Raises:
            BadSample: it is missing, outside its root, or too large.
        """
        return self.store[self.name][0]


class ChatTaskEncoder(TaskEncoder[ChatSample, EncodedSample, PackedRow, PackedRow]):
    """Turns prepared rows into packed rows.

    Args:
        chat: encodes conversations; brings tokenizer and modalities.
        config: what a bad sample does.
        seq_length: tokens of a row; longer samples are skipped.
    """

    decoder = None  # stores give bytes; the modalities decode them

    def __init__(self, *, chat: ChatEncoder, config: DataConfig, seq_length: int):
        self.chat = chat
        self.config = config
        self.seq_length = seq_length
        self.cookers = [Cooker(self.cook)]

    def open_leaf(self, leaf: LoadedDataset, *, worker_config: WorkerConfig) -> SavableDataset[EncodedSample]:
        """Open one data set of a metadataset: read, cook and preencode on demand.

        Raises:
            DataError: a media folder does not exist.
        """
        return MapDataset(
            self.build_cook_crude_sample(
                leaf.dataset.build(),
                worker_config=worker_config,
                subflavors=leaf.dataset.subflavors or {},
                get_primary_aux=leaf.dataset.as_file_store,
                aux={name: checked_store(store) for name, store in (leaf.aux or {}).items()},
            ),
            self.preencode_sample,
            worker_config=worker_config,
            stateless_map_fn=True,
        )

    @stateless
    def cook(self, row: dict[str, Any], **stores: FileStore) -> ChatSample:
        """Read one prepared row: {"id": str, "messages": [{"role", "content"}], "media": {modality: [name]}}.

        Args:
            row: energon's crude sample; `json` holds the line's bytes.
            stores: media stores by modality.
        """
        key = f"{row['__shard__']}:{row['__key__']}"
        restore_key = row["__restore_key__"]
        try:
            fields = _load_row(row["json"])
            key = fields["id"]
            messages = parse_messages(fields.get("messages"))
            media_files = self._name_media(fields.get("media", {}), stores)
        except BadSample as bad:
            skipped = self._skip(key, bad)
            return ChatSample(key=key, messages=[], media_files={}, skipped=skipped, __restore_key__=restore_key)
        return ChatSample(key=key, messages=messages, media_files=media_files, __restore_key__=restore_key)

    def _name_media(self, media: object, stores: Mapping[str, FileStore]) -> dict[str, list[MediaFile]]:
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
            files[modality] = [StoredFile(store=stores[modality], name=name) for name in names]
        return files

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

    @stateless
    def postencode_sample(self, sample: EncodedSample) -> EncodedSample:
        """Read and decode the media of a document that was chosen for a row."""
        if sample.skipped is not None:
            return sample
        try:
            for name, modality in self.chat.modalities.items():
                items = [modality.preprocess(file.get()) for file in sample.media_files.get(name, [])]
                none = torch.empty((0, *modality.media_shape), dtype=modality.media_dtype)
                # A lone item is not copied.
                sample.media[name] = none if not items else items[0][None] if len(items) == 1 else torch.stack(items)
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


def _load_row(line: bytes | str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_row", f"not valid JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("id"), str) or not is_unicode(fields["id"]):
        raise BadSample("bad_row", "not an object with a string id")
    return fields
