"""import_hf: Hugging Face folders -> a checkpoint that loads at any layout. Executes no code from the folders.

Flow: read the two config.json -> sizes; list what the mapping needs and what the folders hold (an unused or missing
tensor is an error); read, rearrange and write tensor by tensor; add a seeded resampler and projector, tokenizer and
image processor.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen3Config, SiglipVisionConfig

from qwen3_vlm.checkpoint import layout, sharded
from qwen3_vlm.config.compose import to_dict
from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, Resample, SiglipEncoderConfig
from qwen3_vlm.convert.connector import fresh_connector
from qwen3_vlm.convert.mapping import Entry, decoder_entries, siglip_entries, siglip_unbuilt
from qwen3_vlm.errors import WeightsError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
VISION_PREFIX = "vision_model."
SIGLIP_DROPPED = ("head.", "text_model.", "logit_scale", "logit_bias")
"""Parts of a SigLIP model that this model does not use: pooling head, text tower, contrastive scale and bias."""
PIL_RESAMPLE = {2: Resample.bilinear, 3: Resample.bicubic}
"""PIL.Image.Resampling codes that preprocessor_config.json may name."""


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, sharded or single file.

    Raises:
        WeightsError: there are no safetensors, or an index names a file that is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(_read_json(index)["weight_map"].values()))
        else:
            files = sorted(p.name for p in folder.glob("*.safetensors"))
        missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
        if missing or not files:
            raise WeightsError(
                f"{folder}: expected model.safetensors, or model.safetensors.index.json with all its files; "
                f"missing: {missing or 'all'}. Pickled weights (.bin) are not read: convert them to safetensors first."
            )
        self._open = [safe_open(folder / name, framework="pt") for name in files]
        self._where = {name: f for f in self._open for name in f.keys()}  # noqa: SIM118 (safe_open is no mapping)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._where[name].get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing: give the folder of a Hugging Face model")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return value


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Sizes of a Qwen3 dense model from its config.json.

    Raises:
        WeightsError: another architecture, or a variant of Qwen3 that this decoder does not compute.
    """
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") != "qwen3":
        raise WeightsError(f"{folder}/config.json has model_type {raw.get('model_type')!r}; --llm needs qwen3 (dense)")
    config = Qwen3Config.from_dict(raw)
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else {"rope_theta": config.rope_theta}
    unsupported = {
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.use_sliding_window,
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "rope_type": rope.get("rope_type", "default") != "default" and rope["rope_type"],
        "rope_scaling": raw.get("rope_scaling"),
    }
    found = {k: v for k, v in unsupported.items() if v}
    if found:
        raise WeightsError(f"{folder}/config.json asks for {found}, which this decoder does not compute")
    return DecoderConfig(
        name=folder.resolve().name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=float(rope["rope_theta"]),
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def read_encoder_config(folder: Path) -> SiglipEncoderConfig:
    """Sizes and image preparation of a SigLIP tower from config.json and preprocessor_config.json.

    Raises:
        WeightsError: another architecture, or an image preparation that the tower's data path does not do.
    """
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") not in ("siglip", "siglip_vision_model"):
        raise WeightsError(
            f"{folder}/config.json has model_type {raw.get('model_type')!r}; --vision needs siglip or "
            "siglip_vision_model (SigLIP2's fixed-resolution models are of these types too)"
        )
    config = SiglipVisionConfig.from_dict(raw.get("vision_config", raw))
    if config.hidden_act != "gelu_pytorch_tanh":
        raise WeightsError(f"{folder}: hidden_act {config.hidden_act!r}, expected gelu_pytorch_tanh")
    processor = _read_json(folder / IMAGE_PROCESSOR_FILE)
    expected: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    other = {key: processor[key] for key, value in expected.items() if processor.get(key, value) != value}
    resample = processor.get("resample", 3)
    if other or resample not in PIL_RESAMPLE:
        raise WeightsError(
            f"{folder}/{IMAGE_PROCESSOR_FILE} asks for {other or {'resample': resample}}, which the data path does not "
            f"do; expected { {key: expected[key] for key in other} or f'resample one of {sorted(PIL_RESAMPLE)}' }"
        )
    mean, std = (processor.get(key, [0.5, 0.5, 0.5]) for key in ("image_mean", "image_std"))
    return SiglipEncoderConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        resample=PIL_RESAMPLE[resample],
        image_mean=tuple(mean),
        image_std=tuple(std),
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One Hugging Face folder matched against its part of the table."""

    tensors: SafetensorsFolder
    entries: list[Entry]
    names: dict[str, str]
    """Name in the table -> name in the folder (a `vision_model.` prefix may be there or not)."""
    dropped: list[str]
    """What the folder holds and this model does not use, by design."""


def match_source(folder: Path, entries: list[Entry], *, droppable: Sequence[str]) -> Source:
    """Match a folder with the table before anything is read or written.

    Args:
        folder: Hugging Face folder.
        entries: the table's part for it.
        droppable: prefixes of names (without `vision_model.`) that are left out by design.

    Raises:
        WeightsError: a tensor is missing, unused, or of the wrong shape; each is named.
    """
    tensors = SafetensorsFolder(folder)
    held = {name.removeprefix(VISION_PREFIX): name for name in sorted(tensors.names())}
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
        for layer in e.layers():
            _check_shape(folder, e, [tensors.shape(held[name]) for name in e.their_names(layer)], layer)
    return Source(tensors=tensors, entries=entries, names={n: held[n] for n in wanted}, dropped=dropped)


def _check_shape(folder: Path, entry: Entry, shapes: list[tuple[int, ...]], layer: int | None) -> None:
    """Rows add up to ours, all further dimensions are equal."""
    rows = sum(s[0] for s in shapes)
    if (rows, *shapes[0][1:]) != entry.shape or any(s[1:] != entry.shape[1:] for s in shapes):
        raise WeightsError(
            f"{folder}: {entry.their_names(layer)} have shapes {shapes}, which do not make {entry.shape} "
            f"({entry.ours}): config.json and weights disagree"
        )


def _sharded(source: Source) -> Iterator[ShardedTensor]:
    """The folder's tensors under the checkpoint's names, one layer at a time."""
    for entry in source.entries:
        for layer in entry.layers():
            value = entry.to_ours([source.tensors.read(source.names[name]) for name in entry.their_names(layer)])
            yield _whole_tensor(entry.ours, value.contiguous(), layer, entry.num_layers)


def _whole_tensor(key: str, value: Tensor, layer: int | None = None, num_layers: int | None = None) -> ShardedTensor:
    if layer is None:
        return ShardedTensor.from_rank_offsets(key, value)
    return ShardedTensor.from_rank_offsets(key, value, (0, layer, num_layers), prepend_axis_num=1)


def copy_processor_files(llm: Path, vision: Path, target: Path) -> None:
    """Tokenizer files of the decoder and the image processor of the tower; only files of known names.

    Raises:
        WeightsError: tokenizer.json is missing.
    """
    if not (llm / "tokenizer.json").is_file():
        raise WeightsError(f"{llm}/tokenizer.json is missing: the checkpoint needs the decoder's fast tokenizer")
    target.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (llm / name).is_file():
            shutil.copyfile(llm / name, target / name)
    shutil.copyfile(vision / IMAGE_PROCESSOR_FILE, target / IMAGE_PROCESSOR_FILE)


def import_hf(
    *,
    llm: Path,
    vision: Path,
    out: Path,
    decoder: DecoderConfig,
    modalities: Mapping[str, ModalityConfig],
    seed: int,
) -> dict[str, list[str]]:
    """Write a whole VLM as a checkpoint; one process.

    Args:
        llm: Qwen3 folder (config.json, safetensors, tokenizer).
        vision: SigLIP folder (config.json, safetensors, preprocessor_config.json).
        out: the checkpoint; must not exist or hold an interrupted import.
        decoder: from `read_decoder_config`.
        modalities: {"image": ...} with the encoder from `read_encoder_config`.
        seed: of the fresh resampler and projector.

    Returns:
        Folder -> names of tensors that are dropped by design.

    Raises:
        WeightsError: the folders do not fit their config.json.
        CheckpointError: `out` is taken.
    """
    tied_head = ("lm_head.weight",) if decoder.tie_word_embeddings else ()
    sources = {str(llm): match_source(llm, decoder_entries(decoder), droppable=tied_head)}
    # Any tensor would do for the dtype; the last norm is small and always there.
    dtype = sources[str(llm)].tensors.read("model.norm.weight").dtype
    connectors: dict[str, Tensor] = {}
    for name, modality in modalities.items():
        tower = f"towers.{name}."
        droppable = (*SIGLIP_DROPPED, *siglip_unbuilt(modality.encoder))
        sources[str(vision)] = match_source(vision, siglip_entries(modality.encoder, tower), droppable=droppable)
        connectors |= fresh_connector(modality, decoder, tower, seed=seed, dtype=dtype)
    layout.start(out)
    copy_processor_files(llm, vision, out / layout.PROCESSOR)
    tensors = [shard for source in sources.values() for shard in _sharded(source)]
    tensors += [_whole_tensor(key, value) for key, value in connectors.items()]
    sharded.save_tensors({f"{t.key}@{t.global_offset}": t for t in tensors}, out / layout.STATE)
    config = {"model": to_dict(decoder), "modality": to_dict(modalities)}
    layout.write_manifest(out, layout.Manifest(step=0, config=config, progress={}))
    return {folder: source.dropped for folder, source in sources.items()}
