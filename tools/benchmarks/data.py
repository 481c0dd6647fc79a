"""data: how well rows are filled and ranks balanced, and what streaming costs.

Lengths are drawn to look like the public sets' (LLaVA-Pretrain: one image and a caption; LLaVA-Instruct: one image and
several turns; Mantis: one to eight images and turns), with 64 visual tokens an image. Pictures are noise, as JPEG.
"""

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qwen3_vlm.config.schema import DataConfig, ModalityConfig, ResamplerConfig, SiglipEncoderConfig
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.order import Share, Sizes, plan_pass
from qwen3_vlm.data.prepare import prepare_llava
from qwen3_vlm.data.store import MediaFolder
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.base import Modality
from qwen3_vlm.modality.registry import build_modalities

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_weights" / "qwen3"
VISUAL_TOKENS = 66
SEQ_LENGTH = 8192
PACKED_SAMPLES = 200_000
DP_SIZE, GLOBAL_BATCH_SIZE = 8, 32
PICTURE_SIZES = [(336, 224), (500, 375), (640, 480)]
WORDS = ("red cat", "blue mat", "tall house", "old tree", "two dogs", "near a", "photo of", "with one")


def measure(folder: Path, num_rows: int, num_images: int, seed: int) -> dict[str, Any]:
    """All measurements of this file, by name."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(seed)
    return {
        "seed": seed,
        "cpus": os.cpu_count(),
        "packing": {name: _packing(draw(generator)) for name, draw in LIKE.items()},
        "images": _images(folder / "images", num_images, generator),
        "start": _start(folder / "start", num_rows, generator),
    }


def _llava_pretrain(generator: np.random.Generator) -> Sizes:
    text = generator.lognormal(3.4, 0.5, PACKED_SAMPLES).clip(8, 400)
    return _sizes(text, np.ones(PACKED_SAMPLES))


def _llava_instruct(generator: np.random.Generator) -> Sizes:
    text = generator.lognormal(5.4, 0.7, PACKED_SAMPLES).clip(30, 2000)
    return _sizes(text, generator.random(PACKED_SAMPLES) > 0.06)


def _mantis(generator: np.random.Generator) -> Sizes:
    images = generator.choice([1, 2, 3, 4, 5, 8], PACKED_SAMPLES, p=[0.15, 0.4, 0.15, 0.15, 0.1, 0.05])
    text = generator.lognormal(5.3, 0.9, PACKED_SAMPLES).clip(20, 6000)
    return _sizes(text, images)


LIKE: dict[str, Callable[[np.random.Generator], Sizes]] = {
    "llava_pretrain": _llava_pretrain,
    "llava_instruct": _llava_instruct,
    "mantis": _mantis,
}


def _sizes(text: np.ndarray, images: np.ndarray) -> Sizes:
    items = images.astype(np.int32)
    return Sizes(tokens=(text.astype(np.int32) + VISUAL_TOKENS * items).astype(np.int32), items=items)


def _packing(sizes: Sizes) -> dict[str, Any]:
    """Fill, how far samples move, and the busiest rank's images above the mean, for each way to pack."""
    numbers = np.random.default_rng(0).permutation(len(sizes.tokens)).astype(np.int64)
    ways = {"default": {}, "bucketed": {"bucket_by_items": True}, "mantis": {"bucket_by_items": True, "max_items": 112}}
    results = {}
    for name, options in ways.items():
        window = DataConfig().packing_buffer_size
        started = time.perf_counter()
        order = plan_pass(numbers, sizes, seq_length=SEQ_LENGTH, window=window, pack=True, **options)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        place = np.empty(len(numbers), np.int64)
        place[numbers] = np.arange(len(numbers))
        moved = np.abs(place[order.samples] - np.arange(len(numbers)))
        items = order.totals(sizes.items)
        items = items[: len(items) // GLOBAL_BATCH_SIZE * GLOBAL_BATCH_SIZE]
        results[name] = {
            "fill": float(sizes.tokens.sum(dtype=np.int64) / (len(order) * SEQ_LENGTH)),
            "moved_mean": float(moved.mean()),
            "moved_max": int(moved.max()),
            "images_a_row_max": int(items.max()),
            "imbalance_in_turn": _imbalance(items, lambda rank, step: step[rank::DP_SIZE]),
            "imbalance_dealt": _imbalance(items, _dealt),
            "plan_s": seconds,
        }
    return results


def _imbalance(items: np.ndarray, of_rank: Callable[[int, np.ndarray], np.ndarray]) -> float:
    """Mean over the steps: images of the rank with most / mean of the ranks."""
    steps = items.reshape(-1, GLOBAL_BATCH_SIZE)
    loads = np.array([[of_rank(rank, step).sum() for rank in range(DP_SIZE)] for step in steps])
    return float((loads.max(axis=1) / loads.mean(axis=1).clip(1)).mean())


def _dealt(rank: int, step: np.ndarray) -> np.ndarray:
    [rows] = Share(global_batch_size=GLOBAL_BATCH_SIZE, dp_rank=rank, dp_size=DP_SIZE).rows(0, step)
    return step[rows]


def _modalities() -> dict[str, Modality]:
    encoder = SiglipEncoderConfig(
        image_size=384, patch_size=14, num_layers=27, hidden_size=1152, ffn_hidden_size=4304, num_attention_heads=16
    )
    return build_modalities({"image": ModalityConfig(encoder=encoder, resampler=ResamplerConfig(num_tokens=64))})


def _prepare(folder: Path, num_rows: int, pictures: list[bytes], generator: np.random.Generator) -> float:
    """Prepare a data set whose rows take the pictures in turn, without copying them; returns seconds.

    Every row has an image file of its own (a hard link), as in the public sets.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(num_rows):
        if number < len(pictures):
            (images / f"{number}.jpg").write_bytes(pictures[number])
        else:
            (images / f"{number}.jpg").hardlink_to(images / f"{number % len(pictures)}.jpg")
    counts = generator.integers(2, 12, num_rows)
    with (folder / "source.jsonl").open("w") as file:
        for number, count in enumerate(counts):
            caption = " ".join(WORDS[(number + n) % len(WORDS)] for n in range(count))
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": caption}]
            file.write(json.dumps({"id": str(number), "image": f"{number}.jpg", "conversations": turns}) + "\n")
    started = time.perf_counter()
    prepare_llava(folder / "source.jsonl", images, folder / "prepared", jobs=os.cpu_count() or 1)
    return time.perf_counter() - started


def _pictures(count: int, generator: np.random.Generator) -> list[bytes]:
    files = []
    for number in range(count):
        width, height = PICTURE_SIZES[number % len(PICTURE_SIZES)]
        noise = generator.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def _loader(folder: Path, *, num_workers: int, cache: Path | None = None) -> RowLoader:
    modalities = _modalities()
    return RowLoader(
        DataConfig(path=str(folder / "prepared"), num_workers=num_workers),
        seq_length=4096,
        modalities=modalities,
        tokenizer=ChatTokenizer.from_folder(TOKENIZER, modalities),
        seed=0,
        cache=cache,
    )


def _images(folder: Path, count: int, generator: np.random.Generator) -> dict[str, float]:
    """Images a second of processor time on one core: read, decode and resize alone, and the whole loader."""
    _prepare(folder, count, _pictures(count, generator), generator)
    files, image = MediaFolder(folder / "images"), _modalities()["image"]
    loader = _loader(folder, num_workers=0)
    best = {"decode_only": 0.0, "loader": 0.0}
    for _ in range(3):
        started = time.process_time()
        for number in range(count):
            image.preprocess(files.read(f"{number}.jpg"))
        best["decode_only"] = max(best["decode_only"], count / (time.process_time() - started))
        started = time.process_time()
        while loader.next_rows() is not None:
            pass
        best["loader"] = max(best["loader"], count / (time.process_time() - started))
    return best | {"ratio": best["loader"] / best["decode_only"]}


def _start(folder: Path, num_rows: int, generator: np.random.Generator) -> dict[str, Any]:
    """Seconds to prepare, and to the first rows (measuring and not); a worker's memory above an empty one's."""
    prepared_s = _prepare(folder, num_rows, _pictures(8, generator), generator)
    empty = iter(DataLoader(range(1000), batch_size=None, num_workers=1, multiprocessing_context="fork"))  # type: ignore[arg-type]
    next(empty)
    base = _pss_mib(empty._workers[0].pid)  # type: ignore[attr-defined]
    empty._shutdown_workers()  # type: ignore[attr-defined]
    seconds = {}
    memory = 0.0
    for name in ("first_start", "next_start"):
        started = time.perf_counter()
        loader = _loader(folder, num_workers=1, cache=folder / "sizes.npz")
        loader.next_rows()
        seconds[f"{name}_s"] = time.perf_counter() - started
        for _ in range(20):
            loader.next_rows()
        memory = max(memory, _pss_mib(loader._iterator._workers[0].pid))  # type: ignore[union-attr]
        loader.close()
    return {"rows": num_rows, "prepare_s": prepared_s, **seconds, "worker_pss_above_empty_mib": memory - base}


def _pss_mib(pid: int) -> float:
    """Proportional set size: shared pages counted by share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    [pss] = [line for line in lines if line.startswith("Pss:")]
    return int(pss.split()[1]) / 1024
