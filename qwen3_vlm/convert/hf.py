"""import_hf: Hugging Face folders -> a checkpoint that loads at any layout. Executes no code from the folders.

Flow: list what the mapping needs and what the folders hold (an unused, missing or misshapen tensor is an error, before
anything is written); then read, rearrange and write block by block, so that memory holds one layer's tensor at most;
add a seeded resampler and projector (or those of our own export), tokenizer and image processor.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qwen3_vlm.checkpoint import layout
from qwen3_vlm.checkpoint.stream import Chunk, write_state
from qwen3_vlm.config.compose import to_dict
from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig
from qwen3_vlm.convert import mapping
from qwen3_vlm.convert.connector import fresh_connector
from qwen3_vlm.convert.folders import is_export, is_whole_export, processor_files
from qwen3_vlm.convert.mapping import Entry
from qwen3_vlm.convert.output import whole_or_nothing
from qwen3_vlm.convert.progress import ByteProgress
from qwen3_vlm.convert.safetensors_files import SafetensorsFolder
from qwen3_vlm.errors import WeightsError

VISION_PREFIX = "vision_model."
SIGLIP_DROPPED = ("head.", "text_model.", "logit_scale", "logit_bias")
"""Parts of a SigLIP model that this model does not use: pooling head, text tower, contrastive scale and bias."""
BLOCK_BYTES = 256 * 2**20
"""A tensor outside the layer stacks (the embedding: 1.2 GB in the 8B) is stored in blocks of rows of about this size:
neither the import nor a rank that loads its share of it ever needs the whole."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One Hugging Face folder matched against its part of the table."""

    tensors: SafetensorsFolder
    entries: list[Entry]
    names: dict[str, str]
    """Name in the table -> name in the folder (a `vision_model.` prefix may be there or not)."""
    dropped: list[str]
    """What the folder holds and this model does not use, by design."""

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype of a checkpoint tensor: that of the tensors which it is made of."""
        layer = entry.layers()[0]
        return self.tensors.dtype(self.names[entry.their_names(layer)[0]])

    def read(self, entry: Entry, layer: int | None) -> Tensor:
        """One layer of a checkpoint tensor."""
        return entry.to_ours([self.tensors.read(self.names[name]) for name in entry.their_names(layer)])


def match_source(folder: Path, entries: list[Entry], *, droppable: Sequence[str], prefix: str = "") -> Source:
    """Match a folder with the table before anything is read or written.

    Args:
        folder: Hugging Face folder.
        entries: the table's part for it.
        droppable: prefixes of names (without `prefix`) that are left out by design.
        prefix: what names may begin with in the folder and do not in the table.

    Raises:
        WeightsError: a tensor is missing, unused, of the wrong shape or of a dtype that does not fit; each is named.
    """
    tensors = SafetensorsFolder(folder)
    held: dict[str, str] = {}
    for name in sorted(tensors.names()):
        other = held.setdefault(name.removeprefix(prefix), name)
        if other != name:
            raise WeightsError(f"{folder}: {other} and {name} are the same tensor: leave the one that is the model's")
    wanted = {name for e in entries for layer in e.layers() for name in e.their_names(layer)}
    rest = sorted(set(held) - wanted)
    dropped = [held[name] for name in rest if name.startswith(tuple(droppable))]
    unused = [held[name] for name in rest if not name.startswith(tuple(droppable))]
    missing = sorted(wanted - set(held))
    if missing or unused:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors are missing {missing[:5]}, {len(unused)} are unused {unused[:5]}. "
            "The folder must hold exactly the architecture that its config.json describes."
        )
    for e in entries:
        names = [held[name] for layer in e.layers() for name in e.their_names(layer)]
        dtypes = {name: tensors.dtype(name) for name in names}
        unlike = next((name for name in names if dtypes[name] != dtypes[names[0]]), None)
        if unlike is not None:
            raise WeightsError(
                f"{folder}: {unlike} is {dtypes[unlike]} and {names[0]} is {dtypes[names[0]]}; both become {e.ours}, "
                "which has one dtype"
            )
        for layer in e.layers():
            _check_shape(folder, e, [tensors.shape(held[name]) for name in e.their_names(layer)], layer)
    return Source(tensors=tensors, entries=entries, names={n: held[n] for n in wanted}, dropped=dropped)


def _check_shape(folder: Path, entry: Entry, shapes: list[tuple[int, ...]], layer: int | None) -> None:
    """Each tensor has the shape that the inverse transform gives it."""
    expected = [tuple(t.shape) for t in entry.to_theirs(torch.empty(entry.shape, device="meta"))]
    if shapes != expected:
        raise WeightsError(
            f"{folder}: {entry.their_names(layer)} have shapes {shapes}, expected {expected} ({entry.ours} "
            f"{entry.shape}): config.json and weights disagree"
        )


def _chunks(source: Source) -> Iterator[Chunk]:
    """The folder's tensors under the checkpoint's names: layer by layer, or in blocks of rows outside the stacks."""
    for entry in source.entries:
        if entry.num_layers is None and len(entry.theirs) == 1:
            yield from _blocks(source, entry)
        else:
            yield from (_layer_chunk(source, entry, layer) for layer in entry.layers())


def _layer_chunk(source: Source, entry: Entry, layer: int | None) -> Chunk:
    stack = () if entry.num_layers is None else (entry.num_layers,)
    return Chunk(
        key=entry.ours,
        global_shape=(*stack, *entry.shape),
        offset=(*(() if layer is None else (layer,)), *[0] * len(entry.shape)),
        shape=(*[1] * len(stack), *entry.shape),
        dtype=source.dtype(entry),
        read=lambda: source.read(entry, layer),
    )


def _blocks(source: Source, entry: Entry) -> Iterator[Chunk]:
    name, dtype = source.names[entry.theirs[0]], source.dtype(entry)
    rows = max(1, BLOCK_BYTES // (math.prod(entry.shape[1:]) * dtype.itemsize))
    for start in range(0, entry.shape[0], rows):
        stop = min(start + rows, entry.shape[0])
        yield Chunk(
            key=entry.ours,
            global_shape=entry.shape,
            offset=(start, *[0] * (len(entry.shape) - 1)),
            shape=(stop - start, *entry.shape[1:]),
            dtype=dtype,
            read=partial(source.tensors.read, name, start, stop),
        )


def _fresh_chunks(connector: Mapping[str, Tensor]) -> list[Chunk]:
    return [
        Chunk(
            key=key,
            global_shape=tuple(value.shape),
            offset=(0,) * value.dim(),
            shape=tuple(value.shape),
            dtype=value.dtype,
            read=partial(torch.Tensor.detach, value),
        )
        for key, value in connector.items()
    ]


def _decoder_source(llm: Path, decoder: DecoderConfig) -> Source:
    tied_head = (mapping.LM_HEAD,) if decoder.tie_word_embeddings else ()
    if is_export(llm):
        others = (mapping.EXPORTED_TOWER, *mapping.EXPORTED_CONNECTOR)
        source = match_source(llm, mapping.exported_decoder_entries(decoder), droppable=(*tied_head, *others))
    else:
        source = match_source(llm, mapping.decoder_entries(decoder), droppable=tied_head)
    if mapping.LM_HEAD in source.dropped:
        _check_tied_head(source)
    return source


def _check_tied_head(source: Source) -> None:
    """A head beside an embedding that config.json ties it to says the same."""
    tensors, embedding = source.tensors, source.entries[0]
    name = source.names[embedding.theirs[0]]
    same = tensors.shape(mapping.LM_HEAD) == embedding.shape
    rows = max(1, BLOCK_BYTES // (math.prod(embedding.shape[1:]) * source.dtype(embedding).itemsize))
    blocks = [(start, min(start + rows, embedding.shape[0])) for start in range(0, embedding.shape[0], rows)]
    if not same or not all(torch.equal(tensors.read(mapping.LM_HEAD, *b), tensors.read(name, *b)) for b in blocks):
        raise WeightsError(
            f"{tensors.folder}: {mapping.LM_HEAD} is not {name}, and config.json says tie_word_embeddings: one of the "
            "two is wrong. Set tie_word_embeddings to false, or remove the head"
        )


def _tower_source(vision: Path, modality: ModalityConfig, tower: str) -> Source:
    unbuilt = mapping.siglip_unbuilt(modality.encoder)
    if is_export(vision):
        others = (mapping.EXPORTED_DECODER, mapping.LM_HEAD, *mapping.EXPORTED_CONNECTOR)
        droppable = (*others, *(mapping.EXPORTED_TOWER + name for name in unbuilt))
        return match_source(vision, mapping.exported_tower_entries(modality.encoder, tower), droppable=droppable)
    return match_source(
        vision,
        mapping.siglip_entries(modality.encoder, tower),
        droppable=(*SIGLIP_DROPPED, *unbuilt),
        prefix=VISION_PREFIX,
    )


def _whole_source(export: Path, decoder: DecoderConfig, modality: ModalityConfig, tower: str) -> Source:
    entries = mapping.exported_decoder_entries(decoder) + mapping.exported_tower_entries(modality.encoder, tower)
    entries += mapping.exported_connector_entries(modality, decoder, tower)
    return match_source(export, entries, droppable=())


def import_hf(
    *,
    llm: Path,
    vision: Path,
    out: Path,
    decoder: DecoderConfig,
    modalities: Mapping[str, ModalityConfig],
    seed: int,
) -> dict[str, list[str]]:
    """Write a whole VLM as a checkpoint; one process, no process group.

    Args:
        llm: Qwen3 folder (config.json, safetensors, tokenizer), or an export of ours.
        vision: SigLIP folder (config.json, safetensors, preprocessor_config.json), or an export of ours. The same
            export for both: its resampler and projector are taken, too.
        out: the checkpoint; must not exist or hold an interrupted import.
        decoder: from `architecture_of`.
        modalities: {"image": ...} from `architecture_of`.
        seed: of the fresh resampler and projector.

    Returns:
        Folder -> names of what is dropped by design: tensors, and keys of its processor's files.

    Raises:
        WeightsError: the folders do not fit their config.json, or the tokenizer does not fit.
        CheckpointError: `out` is taken.
        DiskFullError: there is no room for the checkpoint; what was written is removed.
    """
    ((name, modality),) = modalities.items()
    tower = f"towers.{name}."
    files, left_out = processor_files(llm, vision, decoder.vocab_size, modalities)
    connector: dict[str, Tensor] = {}
    if is_whole_export(llm, vision):
        sources = {str(llm): _whole_source(llm, decoder, modality, tower)}
    else:
        sources = {str(llm): _decoder_source(llm, decoder)}
        dtype = sources[str(llm)].dtype(sources[str(llm)].entries[0])
        sources[str(vision)] = _tower_source(vision, modality, tower)
        connector = fresh_connector(modality, decoder, tower, seed=seed, dtype=dtype)
    chunks = [chunk for source in sources.values() for chunk in _chunks(source)] + _fresh_chunks(connector)
    total = sum(chunk.num_bytes for chunk in chunks)
    history = layout.read_history(llm)
    history += [one for one in layout.read_history(vision) if one not in history]
    existed = out.exists()
    layout.start(out)
    with whole_or_nothing(out, total, keep=existed), ByteProgress("import", total) as progress:
        (out / layout.PROCESSOR).mkdir()
        for file, content in files.items():
            (out / layout.PROCESSOR / file).write_bytes(content)
        write_state(chunks, out / layout.STATE, progress.add)
        layout.write_history(out, history)
        config = {"model": to_dict(decoder), "modality": to_dict(modalities)}
        layout.write_manifest(out, layout.Manifest(step=0, config=config, progress={}))
    return {folder: source.dropped + left_out[folder] for folder, source in sources.items()}
