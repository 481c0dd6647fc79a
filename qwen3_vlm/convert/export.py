"""export_hf: a checkpoint, whatever layout wrote it -> a Hugging Face folder. One tensor is in memory at a time.

The whole model becomes a folder with its own code (qwen3_vlm/hf), or the decoder alone a plain Qwen3. The folder is
written beside its place as OUT.partial and moved there in one step when it is complete; an empty folder that stands
there already is filled, config.json last.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from qwen3_vlm.checkpoint import layout, trusted
from qwen3_vlm.checkpoint.stream import StateReader
from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, SiglipEncoderConfig
from qwen3_vlm.convert import mapping
from qwen3_vlm.convert.folders import PIL_RESAMPLE, read_decoder_config
from qwen3_vlm.convert.mapping import LANGUAGE_MODEL, Entry
from qwen3_vlm.convert.output import finish, place_of, whole_or_nothing
from qwen3_vlm.convert.progress import ByteProgress
from qwen3_vlm.convert.safetensors_files import INDEX, WEIGHTS, SafetensorsFolder, SafetensorsWriter, TensorSpec
from qwen3_vlm.data.tokenizer import IM_END, PAD
from qwen3_vlm.errors import CheckpointError, ConfigError
from qwen3_vlm.hf import folder as hf_folder
from qwen3_vlm.modality.registry import build_modalities

IMAGE = "image"
TOWER = f"towers.{IMAGE}."
MODEL_PREFIXES = (LANGUAGE_MODEL, "towers.")
"""Names of a checkpoint's model tensors; what else a run saves (optimizer) is no part of an export."""
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
MAX_SHARD_BYTES = 5 * 10**9
MODEL_CARD = "README.md"
NOT_LOADED = {MODEL_CARD, "LICENSE", ".gitattributes", ".git", ".cache"}
"""Names that an export may have besides its own files: the Hub adds them, people write them, and nothing loads them."""
EMBEDDING = f"{LANGUAGE_MODEL}embedding.word_embeddings.weight"


class Part(Enum):
    """What is exported."""

    all = "all"
    llm = "llm"


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What an export is made from."""

    manifest: layout.Manifest
    trainings: list[dict[str, Any]]
    decoder: DecoderConfig
    modality: ModalityConfig
    state: StateReader
    token_ids: dict[str, int]


def export_hf(*, checkpoint: Path, out: Path, part: Part, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """Write a checkpoint as a Hugging Face folder; one process, no process group.

    Args:
        checkpoint: CKPT.
        out: the folder; must not exist, or be empty.
        part: all (image-text-to-text, needs trust_remote_code) or llm (a plain Qwen3ForCausalLM).
        max_shard_bytes: largest size of a safetensors file.

    Returns:
        Names of tensors in the checkpoint that are left out by design.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, holds one that has no place in the export, or one of another
            shape; nothing is written.
        ConfigError: `out` is taken, or the checkpoint's modalities have no transformers code.
        DiskFullError: there is no room for the folder; what was written is removed.
    """
    out = out.resolve()
    directory = layout.resolve(checkpoint)
    model = _open(directory)
    entries = _entries(model, part)
    dropped = _match(model.state, entries, part)
    specs = {name: spec for entry in _by_layer(entries) for name, spec in _specs(model.state, *entry)}
    total = sum(spec.num_bytes for spec in specs.values())
    place = place_of(out)
    with whole_or_nothing(place, total, keep=place == out), ByteProgress("export", total) as progress:
        with SafetensorsWriter(place, specs, max_shard_bytes) as writer:
            for entry, layer in _by_layer(entries):
                for name, value in zip(entry.their_names(layer), _theirs(model.state, entry, layer), strict=True):
                    writer.write(name, value)
                    progress.add(value.nbytes)
        for name, text in _text_files(model, part, directory, out.name).items():
            (place / name).write_text(text)
        finish(place, out)
    return dropped


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a folder differs from a checkpoint; a finding is a name and, in words, how."""

    tensors: int
    """Compared with each other, or missing."""
    files: list[str]
    misfits: list[str]
    """Tensors that are missing, too many, or of another shape or dtype: there is no model to ask."""
    values: list[str]
    """Tensors that fit and hold other values."""


def compare_folder(*, checkpoint: Path, folder: Path, part: Part) -> Comparison:
    """Compare a checkpoint with an export of it, or (llm) with any Qwen3 folder. Nothing of the folder is run.

    Args:
        checkpoint: CKPT.
        folder: an export: all files but README.md are compared byte for byte with what export writes, and none may be
            added. Another Qwen3: the numbers of its config.json are compared.
        part: what the folder holds.

    Returns:
        The findings, one tensor in memory at a time.

    Raises:
        CheckpointError, ConfigError: as `export_hf`.
        WeightsError: the folder's tensors or its config.json cannot be read.
    """
    directory = layout.resolve(checkpoint)
    model = _open(directory)
    entries = _entries(model, part)
    _match(model.state, entries, part)
    held = SafetensorsFolder(folder)
    files = _different_files(model, part, directory, folder)
    names = held.names()
    misfits, values = list[str](), list[str]()
    compared = 0
    for entry, layer in _by_layer(entries):
        for name, value in zip(entry.their_names(layer), _theirs(model.state, entry, layer), strict=True):
            compared += 1
            if name not in names:
                misfits.append(f"{name}: not in the folder")
                continue
            names.remove(name)
            if held.shape(name) != tuple(value.shape) or held.dtype(name) != value.dtype:
                found, expected = (held.dtype(name), held.shape(name)), (value.dtype, tuple(value.shape))
                misfits.append(f"{name}: {found} in the folder, {expected} in the checkpoint")
            elif different := _different_values(held.read(name), value):
                values.append(f"{name}: {different} of {value.numel()} values")
    if model.decoder.tie_word_embeddings and mapping.LM_HEAD in names:  # as some tied models are published
        names.remove(mapping.LM_HEAD)
        compared += 1
        if not _is_tied_head(held, entries):
            misfits.append(f"{mapping.LM_HEAD}: not the embedding, and the model is tied")
    misfits += [f"{name}: not in the checkpoint" for name in sorted(names)]
    return Comparison(tensors=compared, files=files, misfits=misfits, values=values)


def _different_values(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of values of one dtype and shape with different bits."""
    as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    if torch.equal(*as_bytes):
        return 0
    return int((as_bytes[0] != as_bytes[1]).view(-1, a.element_size()).any(dim=1).sum())


def _is_tied_head(held: SafetensorsFolder, entries: list[Entry]) -> bool:
    embedding = next(entry.theirs[0] for entry in entries if entry.ours == EMBEDDING)
    if embedding not in held.names():
        return False
    kinds = [(held.shape(name), held.dtype(name)) for name in (mapping.LM_HEAD, embedding)]
    return kinds[0] == kinds[1] and not _different_values(held.read(mapping.LM_HEAD), held.read(embedding))


def _different_files(model: _Model, part: Part, directory: Path, folder: Path) -> list[str]:
    expected = {name: text.encode() for name, text in _text_files(model, part, directory, folder.name).items()}
    expected.pop(MODEL_CARD, None)
    different = {
        name for name, raw in expected.items() if not (folder / name).is_file() or (folder / name).read_bytes() != raw
    }
    if part is Part.llm and different >= {"config.json", "generation_config.json", hf_folder.CHAT_TEMPLATE}:
        ours, theirs = asdict(model.decoder), asdict(read_decoder_config(folder))  # not an export
        return [
            f"config.json: {key} is {theirs[key]}, {ours[key]} in the checkpoint"
            for key in ours
            if key != "name" and ours[key] != theirs[key]
        ]
    weights = {WEIGHTS}
    if (folder / INDEX).is_file():
        weights = {INDEX, *json.loads((folder / INDEX).read_text())["weight_map"].values()}
    strange = {path.name for path in folder.iterdir()} - set(expected) - weights - NOT_LOADED
    return [
        *(f"{name}: not as export writes it" for name in expected if name in different),
        *(f"{name}: not a file of an export" for name in sorted(strange)),
    ]


def _open(directory: Path) -> _Model:
    state = directory / layout.STATE
    trusted.check(state)
    architecture = layout.read_architecture(directory)
    encoders = {name: type(modality.encoder) for name, modality in architecture.modality.items()}
    if encoders != {IMAGE: SiglipEncoderConfig}:
        kinds = {name: encoder.__name__ for name, encoder in encoders.items()}
        raise ConfigError(f"{directory} has the modalities {kinds}; the exported code knows a SigLIP for images only")
    placeholder = build_modalities(architecture.modality)[IMAGE].placeholder
    tokenizer_file = directory / layout.PROCESSOR / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise CheckpointError(f"{tokenizer_file} is missing: the checkpoint is incomplete, use another one")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens = (IM_END, PAD, placeholder.start, placeholder.pad, placeholder.end)
    found = {token: tokenizer.token_to_id(token) for token in tokens}
    ids = {token: number for token, number in found.items() if number is not None}
    if len(ids) < len(found):
        raise CheckpointError(f"{tokenizer_file} lacks {sorted(set(found) - set(ids))}: the prompt grammar needs them")
    return _Model(
        manifest=layout.read_manifest(directory),
        trainings=layout.trainings(directory),
        decoder=architecture.model,
        modality=architecture.modality[IMAGE],
        state=StateReader(state),
        token_ids=ids,
    )


def _entries(model: _Model, part: Part) -> list[Entry]:
    if part is Part.llm:
        return mapping.decoder_entries(model.decoder)
    return [
        *mapping.exported_decoder_entries(model.decoder),
        *mapping.exported_tower_entries(model.modality.encoder, TOWER),
        *mapping.exported_connector_entries(model.modality, model.decoder, TOWER),
    ]


def _match(state: StateReader, entries: list[Entry], part: Part) -> list[str]:
    """Match the checkpoint with the table before anything is written; returns what is left out by design."""
    wanted = {entry.ours for entry in entries}
    held = state.names()
    prefixes = MODEL_PREFIXES if part is Part.all else (LANGUAGE_MODEL,)
    unused = sorted(name for name in held - wanted if name.startswith(prefixes))
    missing = sorted(wanted - held)
    if missing or unused:
        raise CheckpointError(
            f"{state.directory}: {len(missing)} tensors are missing {missing[:5]}, {len(unused)} have no place in the "
            f"export {unused[:5]}. The state must hold the architecture that {layout.MANIFEST} describes."
        )
    for entry in entries:
        stored = state.shape(entry.ours)
        expected = entry.shape if entry.num_layers is None else (entry.num_layers, *entry.shape)
        fits = stored == expected or (entry.padded and stored[0] > expected[0] and stored[1:] == expected[1:])
        if not fits:
            raise CheckpointError(
                f"{state.directory}: {entry.ours} has shape {stored}, {layout.MANIFEST} describes {expected}: the "
                "checkpoint is damaged, use another one"
            )
        if state.dtype(entry.ours) not in DTYPE_NAMES:
            raise CheckpointError(
                f"{state.directory}: {entry.ours} is {state.dtype(entry.ours)}; an export holds "
                f"{', '.join(DTYPE_NAMES.values())}"
            )
    return sorted(held - wanted)


def _by_layer(entries: list[Entry]) -> Iterator[tuple[Entry, int | None]]:
    """(entry, layer) with a layer's tensors together: a shard then holds whole layers, for the most part."""
    for stack in ("", *dict.fromkeys(_stack(entry) for entry in entries if entry.num_layers is not None)):
        members = [entry for entry in entries if _stack(entry) == stack]
        for layer in members[0].layers():
            yield from ((entry, layer) for entry in members)


def _stack(entry: Entry) -> str:
    """Name of the layer stack that an entry belongs to; empty outside of them."""
    return "" if entry.num_layers is None else entry.theirs[0].partition("{i}")[0]


def _specs(state: StateReader, entry: Entry, layer: int | None) -> Iterator[tuple[str, TensorSpec]]:
    dtype = state.dtype(entry.ours)
    theirs = entry.to_theirs(torch.empty(entry.shape, device="meta"))
    for name, value in zip(entry.their_names(layer), theirs, strict=True):
        yield name, TensorSpec(shape=tuple(value.shape), dtype=dtype)


def _theirs(state: StateReader, entry: Entry, layer: int | None) -> tuple[torch.Tensor, ...]:
    if layer is None:
        return entry.to_theirs(state.read(entry.ours, 0, entry.shape[0]))
    return entry.to_theirs(state.read(entry.ours, layer, layer + 1)[0])


def _text_files(model: _Model, part: Part, directory: Path, name: str) -> dict[str, str]:
    """File name -> content; config.json last."""
    spec = _folder_spec(model)
    processor = directory / layout.PROCESSOR
    files = {n: (processor / n).read_text() for n in layout.TOKENIZER_FILES if (processor / n).is_file()}
    files["tokenizer_config.json"] = hf_folder.tokenizer_config(files.get("tokenizer_config.json", "{}"))
    if model.trainings:
        files[layout.HISTORY] = json.dumps(model.trainings, indent=1) + "\n"
    if part is Part.all:
        return files | hf_folder.text_files(spec, _card(model, name))
    files |= {
        hf_folder.CHAT_TEMPLATE: hf_folder.chat_template(),
        "generation_config.json": hf_folder.generation_config(spec),
        "README.md": _llm_readme(_card(model, name)),
    }
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": spec.dtype,
        "torch_dtype": spec.dtype,  # its name before transformers 4.56
        "eos_token_id": model.token_ids[IM_END],
        "pad_token_id": model.token_ids[PAD],
    }
    return files | {"config.json": json.dumps(config | spec.text_config, indent=2) + "\n"}


def decoder_config_json(decoder: DecoderConfig) -> dict[str, Any]:
    """Sizes under the names of Qwen3's config.json; the inverse of `read_decoder_config`."""
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.ffn_hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_query_groups,
        "head_dim": decoder.head_dim,
        "max_position_embeddings": decoder.max_position_embeddings,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": decoder.rms_norm_eps,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }


def vision_config_json(encoder: SiglipEncoderConfig) -> dict[str, Any]:
    """Sizes under the names of SigLIP's config.json; the inverse of `read_encoder_config`."""
    return {
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.ffn_hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_attention_heads,
        "layer_norm_eps": encoder.layer_norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
    }


def _folder_spec(model: _Model) -> hf_folder.FolderSpec:
    encoder, resampler = model.modality.encoder, model.modality.resampler
    return hf_folder.FolderSpec(
        text_config=decoder_config_json(model.decoder),
        vision_config=vision_config_json(encoder),
        feature_layer=encoder.feature_layer,
        num_tokens=resampler.num_tokens,
        depth=resampler.depth,
        latent_init=resampler.latent_init.value,
        ffn_multiplier=resampler.ffn_multiplier,
        image_mean=encoder.image_mean,
        image_std=encoder.image_std,
        resample={kind: code for code, kind in PIL_RESAMPLE.items()}[encoder.resample],
        dtype=DTYPE_NAMES[model.state.dtype(f"{LANGUAGE_MODEL}decoder.final_layernorm.weight")],
        token_ids=model.token_ids,
    )


def _card(model: _Model, name: str) -> hf_folder.Card:
    """What the checkpoint itself records of all trainings; paths are cut to their last part."""
    manifest, encoder = model.manifest, model.modality.encoder
    recipe = [
        f"{', '.join(one['trained'])}: {one['steps']} steps of {one['rows']} rows of {one['seq_length']} tokens "
        f"({one['samples']} samples of {one['data']}), learning rate {one['lr']:g}, {one['precision']}"
        for one in model.trainings
    ]
    patches = (encoder.image_size // encoder.patch_size) ** 2
    return hf_folder.Card(
        name=name,
        license="other",
        llm=model.decoder.name,
        vision=f"a SigLIP tower ({encoder.num_layers} layers of width {encoder.hidden_size}, {patches} patches)",
        recipe=recipe or ["none: an import"],
        data=list(dict.fromkeys(one["data"] for one in model.trainings)),
        checkpoint=f"step {manifest.step}, written by version {manifest.code_version}",
    )


def _llm_readme(card: hf_folder.Card) -> str:
    """README.md of the decoder alone."""
    return "\n".join(
        (
            "---",
            f"license: {card.license}",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {card.name}",
            "",
            f"The decoder of a vision-language model as a plain Qwen3ForCausalLM, started from {card.llm}.",
            "",
            "Training of the whole model:",
            "",
            *(f"- {line}" for line in card.recipe),
            "",
            f"Checkpoint: {card.checkpoint}",
            "",
        )
    )
