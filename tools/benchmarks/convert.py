"""convert: random weights of a model's true shapes go through import and export.

Time is compared with a plain copy of the same bytes, cold and flushed to the disk; memory is the peak of the converting
process, file pages included; every tensor of the export is compared by hash. Needs room for two copies of the weights.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from qwen3_vlm.convert.safetensors_files import TensorSpec

CONVERT = Path(__file__).parents[1] / "convert.py"
POLL_S = 0.05


def measure(folder: Path, model: str, modality: str, seed: int) -> dict[str, Any]:
    """Convert there and back.

    Phases are in this order so that at most two copies of the weights exist at any moment.

    Args:
        folder: empty, for the weights.
        model: a size of conf/model.
        modality: a tower of conf/modality.
        seed: of the weights.

    Returns:
        Seconds and peak memory of import and export, and whether every bit came through.
    """
    llm, vision, checkpoint, export = (folder / name for name in ("llm", "vision", "ckpt", "export"))
    hashes = _write_model(llm, vision, model, modality, seed)
    num_bytes = _num_bytes(llm, vision)
    copy_before = _copy_seconds([llm, vision], folder / "copy")
    imported = _measure(
        [llm, vision], "import", "--llm", str(llm), "--vision", str(vision), "--out", str(checkpoint), f"model={model}"
    )
    for source in (llm, vision):
        shutil.rmtree(source)
    checkpoint_bytes = _num_bytes(checkpoint)
    copy_after = _copy_seconds([checkpoint], folder / "copy")
    exported = _measure([checkpoint], "export", "--checkpoint", str(checkpoint), "--out", str(export))
    shutil.rmtree(checkpoint)
    different = _differences(export, hashes)
    return {
        "model": model,
        "modality": modality,
        "seed": seed,
        "cpus": os.cpu_count(),
        "weights_gb": num_bytes / 1e9,
        "checkpoint_gb": checkpoint_bytes / 1e9,
        "import": imported | {"copy_s": copy_before, "times_a_copy": imported["seconds"] / copy_before},
        "export": exported | {"copy_s": copy_after, "times_a_copy": exported["seconds"] / copy_after},
        "tensors_compared": len(hashes),
        "different": different[:10],
        "bit_exact": not different,
    }


def _write_model(llm: Path, vision: Path, model: str, modality: str, seed: int) -> dict[str, str]:
    """Random bits in the shapes of a published model, one tensor in memory at a time.

    Returns:
        Name in our export -> SHA-256 of its bytes.
    """
    from qwen3_vlm.config.compose import compose
    from qwen3_vlm.convert import mapping
    from qwen3_vlm.convert.export import decoder_config_json, vision_config_json

    overrides = [f"model={model}", f"modality={modality}", "exp_dir=unused", "data.path=unused"]
    run = compose("stage1_align", overrides)
    decoder, image = run.model, run.modality["image"]
    size = {"height": image.encoder.image_size, "width": image.encoder.image_size}
    resample = {"bilinear": 2, "bicubic": 3}[image.encoder.resample.value]
    configs = {
        llm: {"config.json": {"model_type": "qwen3"} | decoder_config_json(decoder)},
        vision: {
            "config.json": {"model_type": "siglip_vision_model"} | vision_config_json(image.encoder),
            "preprocessor_config.json": {"size": size, "resample": resample},
        },
    }
    tower = "towers.image."
    tables = {
        llm: (mapping.decoder_entries(decoder), mapping.exported_decoder_entries(decoder)),
        vision: (
            mapping.siglip_entries(image.encoder, tower),
            mapping.exported_tower_entries(image.encoder, tower),
        ),
    }
    hashes: dict[str, str] = {}
    for folder, (published, exported) in tables.items():
        folder.mkdir()
        for name, config in configs[folder].items():
            (folder / name).write_text(json.dumps(config))
        names = dict(zip(_names(published), _names(exported), strict=True))
        specs = dict(_specs(published))
        hashes |= {names[name]: digest for name, digest in _write_random(folder, specs, seed).items()}
    _write_tokenizer(llm)
    return hashes


def _names(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for layer in entry.layers():
            yield from entry.their_names(layer)


def _specs(entries: list[Any]) -> "Iterator[tuple[str, TensorSpec]]":
    from qwen3_vlm.convert.safetensors_files import TensorSpec

    for entry in entries:
        shapes = [tuple(t.shape) for t in entry.to_theirs(torch.empty(entry.shape, device="meta"))]
        for layer in entry.layers():
            for name, shape in zip(entry.their_names(layer), shapes, strict=True):
                yield name, TensorSpec(shape=shape, dtype=torch.bfloat16)


def _write_random(folder: Path, specs: "dict[str, TensorSpec]", seed: int) -> dict[str, str]:
    """Every tensor draws its bits from its own generator; returns their hashes."""
    from qwen3_vlm.convert.progress import ByteProgress
    from qwen3_vlm.convert.safetensors_files import SafetensorsWriter

    hashes = {}
    total = sum(spec.num_bytes for spec in specs.values())
    with (
        ByteProgress(f"random weights: {folder.name}", total) as progress,
        SafetensorsWriter(folder, specs, max_shard_bytes=4 * 10**9) as writer,
    ):
        for name, spec in specs.items():
            start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
            generator = np.random.Generator(np.random.SFC64(start))
            words = generator.integers(0, 2**64, -(-spec.num_bytes // 8), dtype=np.uint64)
            bits = torch.from_numpy(words.view(np.uint8)[: spec.num_bytes])
            hashes[name] = hashlib.sha256(bits.numpy().data).hexdigest()
            writer.write(name, bits.view(spec.dtype).view(spec.shape))
            progress.add(spec.num_bytes)
    return hashes


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the prompt grammar's tokens: conversion looks up no other."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    names = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad")
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))


def _files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def _num_bytes(*folders: Path) -> int:
    return sum(path.stat().st_size for path in _files(*folders))


def _forget_cached(folders: list[Path]) -> None:
    """Let the kernel drop what it keeps of these files, so that they are read from the disk."""
    for path in _files(*folders):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy_seconds(folders: list[Path], target: Path) -> float:
    """A plain copy of all files, flushed to the disk; removed again."""
    _forget_cached(folders)
    target.mkdir()
    started = time.monotonic()
    for number, path in enumerate(_files(*folders)):
        copy = target / str(number)
        shutil.copyfile(path, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def _measure(sources: list[Path], *arguments: str) -> dict[str, float]:
    """Run tools/convert.py; its time and the highest memory that the kernel recorded for it."""
    _forget_cached(sources)
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, str(CONVERT), *arguments], stdout=subprocess.DEVNULL)
    peak_kb = {"VmHWM": 0, "RssAnon": 0}
    while child.poll() is None:
        for key, value in _memory_kb(child.pid, tuple(peak_kb)).items():
            peak_kb[key] = max(peak_kb[key], value)
        time.sleep(POLL_S)
    if child.returncode:
        raise SystemExit(f"tools/convert.py {arguments[0]} failed with exit code {child.returncode}")
    return {
        "seconds": time.monotonic() - started,
        "peak_rss_gib": peak_kb["VmHWM"] / 2**20,
        "peak_anonymous_gib": peak_kb["RssAnon"] / 2**20,
    }


def _memory_kb(pid: int, keys: tuple[str, ...]) -> dict[str, int]:
    """Lines of /proc/PID/status; none when the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = dict(line.split(":", 1) for line in lines)
    return {key: int(found[key].split()[0]) for key in keys if key in found}


def _differences(export: Path, hashes: dict[str, str]) -> list[str]:
    """Names whose bytes in the export are not those that were generated."""
    from qwen3_vlm.convert.safetensors_files import SafetensorsFolder

    tensors = SafetensorsFolder(export)
    missing = sorted(set(hashes) - tensors.names())
    return missing + [
        name
        for name, digest in hashes.items()
        if name not in missing
        and hashlib.sha256(tensors.read(name).view(-1).view(torch.uint8).numpy().data).hexdigest() != digest
    ]
