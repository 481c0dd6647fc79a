"""Fixtures of the data room: tokenizer, modalities, prepared folders of generated rows, loaders."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from megatron.energon import CrudeJsonlDatasetFactory
from megatron.energon.epathlib import EPath

from qwen3_vlm.config.schema import DataConfig, ModalityConfig, ResamplerConfig
from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.order import Share
from qwen3_vlm.data.prepare import Form, shards
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.base import Modality
from qwen3_vlm.modality.registry import MODALITIES, build_modalities
from tests.unit.data.cases import ToneModality, image_config, jpeg, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def modalities() -> dict[str, Modality]:
    return build_modalities({"image": image_config()})


@pytest.fixture
def two_modalities(monkeypatch: pytest.MonkeyPatch) -> dict[str, Modality]:
    monkeypatch.setitem(MODALITIES, "tone", ToneModality)
    return build_modalities({"image": image_config(2), "tone": ModalityConfig(resampler=ResamplerConfig(num_tokens=3))})


@pytest.fixture
def tokenizer(tokenizer_folder: Path, modalities: dict[str, Modality]) -> ChatTokenizer:
    return ChatTokenizer.from_folder(tokenizer_folder, modalities)


@pytest.fixture
def chat(tokenizer: ChatTokenizer, modalities: dict[str, Modality]) -> ChatEncoder:
    return ChatEncoder(tokenizer, modalities)


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (dicts, or raw lines) as a prepared folder, with an image for every name without a file.

    form tar puts the images into shards of eight and renames them in the rows, as preparation does; names that have no
    file stay.
    """

    def write(
        rows: list[dict | str],
        *,
        images: dict[str, bytes] | None = None,
        stores: dict[str, Path] | None = None,
        form: Form = Form.jsonl,
    ) -> Path:
        folder, root = tmp_path / "data", tmp_path / "data" / "images"
        root.mkdir(parents=True, exist_ok=True)
        for i in range(len(rows)):
            (root / f"s{i}.jpg").write_bytes(jpeg(i))
        for name, content in (images or {}).items():
            (root / name).write_bytes(content)
        aux = "".join(f"\n      {name}: filesystem://{path}" for name, path in (stores or {"image": root}).items())
        if form is Form.tar:
            files = sorted(path.name for path in root.iterdir())
            shards.write_shards([(root, name) for name in files], folder, size=8, jobs=1)
            entries = {name: shards.entry_name(i, name) for i, name in enumerate(files)}
            rows = [
                row | {"media": {"image": [entries.get(name, name) for name in row["media"]["image"]]}} for row in rows
            ]
            aux = f"\n      image: {shards.FOLDER}"
            shutil.rmtree(root)
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
        (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
        CrudeJsonlDatasetFactory.prepare_dataset(EPath(folder / "train.jsonl"))
        (folder / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n"
            f"  train:\n    path: train.jsonl\n    aux:{aux}\n"
        )
        (folder / "report.json").write_text(json.dumps({"train": len(rows)}))
        return folder

    return write


@pytest.fixture
def make_loader(tokenizer_folder: Path, modalities: dict[str, Modality]) -> Iterator[Callable[..., RowLoader]]:
    """Build a RowLoader over a folder; keywords go to DataConfig, or to RowLoader where it has them."""
    loaders: list[RowLoader] = []

    def build(path: Path, *, mods: dict[str, Modality] | None = None, **options: object) -> RowLoader:
        used = modalities if mods is None else mods
        own = {"seq_length": 64, "seed": 7, "split": "train", "cache": None, "gather": None}
        for name in own.keys() & options.keys():
            own[name] = options.pop(name)
        gather = own.pop("gather")
        share = Share(**{f.name: options.pop(f.name) for f in fields(Share) if f.name in options})
        share = replace(share, global_batch_size=max(share.global_batch_size, share.dp_size))
        config = DataConfig(path=str(path), **({"num_workers": 0, "packing_buffer_size": 8} | options))
        chat_tokenizer = ChatTokenizer.from_folder(tokenizer_folder, used)
        common = {"config": config, "modalities": used, "tokenizer": chat_tokenizer, **own}
        loader = RowLoader(**common)
        if share != Share():  # the only chunk of so few samples is rank 0's
            measured = np.stack([loader.sizes.tokens, loader.sizes.items], axis=1)
            answers = iter([[np.zeros((1, 2))], [measured] + [measured[:0]] * (share.dp_size - 1)])
            loader = RowLoader(**common, share=share, gather=gather or (lambda _: next(answers)))
        loaders.append(loader)
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()
