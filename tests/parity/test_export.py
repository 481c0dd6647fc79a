"""export_hf: the inverse of the import, bit for bit; strict about what a checkpoint holds; whole or not at all."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from qwen3_vlm.checkpoint import layout
from qwen3_vlm.checkpoint.compare import tensor_differences
from qwen3_vlm.checkpoint.stream import Chunk, StateReader, write_state
from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.convert import hf, progress
from qwen3_vlm.convert.architecture import architecture_of
from qwen3_vlm.convert.export import Part, export_hf
from qwen3_vlm.convert.output import MARKER
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import CheckpointError, ConfigError, DiskFullError, WeightsError
from qwen3_vlm.modality.registry import build_modalities
from qwen3_vlm.parallel.topology import Topology
from tests.cases import Case, random_connector
from tests.hf_folders import import_folders, rewrite_config, rewrite_tensors, write_llm, write_siglip, write_tower

Tensors = dict[str, Tensor]
CONNECTOR = "modality.image.resampler."
SMALL = [f"{CONNECTOR}num_tokens=4", f"{CONNECTOR}depth=1"]
EMBEDDING = "language_model.embedding.word_embeddings.weight"
QKV = "language_model.decoder.layers.self_attention.linear_qkv.weight"


def folder_tensors(folder: Path) -> Tensors:
    """All tensors of a folder, through the library."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_equal(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def tokens_of(folder: Path, ids: Sequence[int]) -> list[str]:
    """Added tokens by their ids."""
    tokens = {t["id"]: t["content"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    return [tokens[i] for i in ids]


def write_folders(folder: Path, *, dtype: torch.dtype = torch.float32, **sizes: object) -> tuple[Path, Path]:
    llm, tower = folder / "llm", folder / "tower"
    write_llm(llm, dtype=dtype, **({"num_hidden_layers": 2} | sizes))
    write_tower(tower, dtype=dtype, num_hidden_layers=2)
    return llm, tower


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders llm and tower, and the checkpoint ckpt with a connector that is no fresh one."""
    folder = tmp_path_factory.mktemp("original")
    with mock.patch("qwen3_vlm.convert.hf.fresh_connector", random_connector):
        import_folders(*write_folders(folder), folder / "ckpt", SMALL)
    return folder


@pytest.fixture(scope="module")
def exported(original: Path) -> Path:
    export_hf(checkpoint=original / "ckpt", out=original / "hf", part=Part.all)
    return original / "hf"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to tamper with."""
    return Path(shutil.copytree(original / "ckpt", tmp_path / "tampered"))


def rewrite_state(checkpoint: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors of a checkpoint by what `change` makes of them."""
    state = checkpoint / layout.STATE
    reader = StateReader(state)
    tensors = change({name: reader.read(name) for name in reader.names()})
    shutil.rmtree(state)
    state.mkdir()
    chunks = [
        Chunk(
            key=name,
            global_shape=tuple(t.shape),
            offset=(0,) * t.dim(),
            shape=tuple(t.shape),
            dtype=t.dtype,
            read=t.clone,
        )
        for name, t in tensors.items()
    ]
    write_state(chunks, state, lambda _: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_every_bit_comes_back(tmp_path: Path, dtype: torch.dtype, tied: bool, groups: int):
    """A vocabulary of 275, in blocks of a few rows, into shards of a few tensors."""
    llm, tower = write_folders(
        tmp_path, dtype=dtype, tie_word_embeddings=tied, num_key_value_heads=groups, vocab_size=275
    )
    with mock.patch.object(hf, "BLOCK_BYTES", 10_000):
        import_folders(llm, tower, tmp_path / "ckpt", SMALL)
    for part in Part:
        export_hf(checkpoint=tmp_path / "ckpt", out=tmp_path / f"hf_{part.value}", part=part, max_shard_bytes=100_000)
    assert_equal(folder_tensors(tmp_path / "hf_llm"), load_file(llm / "model.safetensors"))
    whole = folder_tensors(tmp_path / "hf_all")
    assert len(list((tmp_path / "hf_all").glob("*.safetensors"))) > 3
    theirs = {
        "model.vision_tower." + name.removeprefix("vision_model."): t
        for name, t in load_file(tower / "model.safetensors").items()
        if "head." not in name
    }
    theirs |= {
        name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1): t
        for name, t in load_file(llm / "model.safetensors").items()
    }
    connector = {name: t for name, t in whole.items() if name.startswith(("model.resampler.", "model.projector."))}
    assert connector
    state = StateReader(tmp_path / "ckpt" / layout.STATE)
    for name, tensor in connector.items():
        assert torch.equal(tensor, state.read(name.replace("model.", "towers.image.", 1)))
    assert_equal(whole, theirs | connector)
    assert ("lm_head.weight" in whole) != tied


def test_the_decoder_alone_answers_as_before(original: Path, tmp_path: Path):
    dropped = export_hf(checkpoint=original / "ckpt", out=tmp_path / "llm", part=Part.llm)
    assert dropped and all(name.startswith("towers.image.") for name in dropped)
    ids = torch.arange(40).reshape(2, 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert type(model) is Qwen3ForCausalLM
    expected = AutoModelForCausalLM.from_pretrained(original / "llm")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not list((tmp_path / "llm").glob("*.py"))
    stops = model.generation_config
    assert tokens_of(tmp_path / "llm", stops.eos_token_id) == ["<|im_end|>", "<|endoftext|>"]
    assert tokens_of(tmp_path / "llm", [stops.pad_token_id]) == ["<|endoftext|>"] and not stops.do_sample


def test_rows_that_pad_the_vocabulary_are_left_behind(checkpoint: Path, exported: Path, tmp_path: Path):
    """A run at tp 4 saves 272 + 4 rows in embedding and head."""
    padded = (EMBEDDING, "language_model.output_layer.weight")
    rewrite_state(
        checkpoint, lambda ts: ts | {n: torch.cat([ts[n], torch.full((4, ts[n].shape[1]), 9.0)]) for n in padded}
    )
    export_hf(checkpoint=checkpoint, out=tmp_path / "hf", part=Part.all)
    assert_equal(folder_tensors(tmp_path / "hf"), folder_tensors(exported))


def test_what_a_run_saves_beside_the_model_is_left_out_by_name(checkpoint: Path, exported: Path, tmp_path: Path):
    name = "optimizer.state.exp_avg.towers.image.resampler.latents"
    rewrite_state(checkpoint, lambda ts: ts | {name: torch.zeros(4, 48)})
    assert export_hf(checkpoint=checkpoint, out=tmp_path / "hf", part=Part.all) == [name]
    assert_equal(folder_tensors(tmp_path / "hf"), folder_tensors(exported))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "name", "word"),
    [
        (without(QKV), QKV, "missing"),
        (lambda ts: ts | {"towers.image.lora.a": torch.zeros(2)}, "towers.image.lora.a", "no place"),
        (lambda ts: ts | {QKV: ts[QKV].transpose(1, 2).contiguous()}, QKV, "has shape"),
        (lambda ts: ts | {QKV: torch.cat([ts[QKV], ts[QKV]])}, QKV, "has shape"),
        (lambda ts: ts | {EMBEDDING: ts[EMBEDDING][:-1]}, EMBEDDING, "has shape"),
        (lambda ts: ts | {QKV: ts[QKV].to(torch.float64)}, QKV, "float64"),
    ],
    ids=["missing", "unknown", "flipped", "more layers", "short vocabulary", "dtype"],
)
def test_a_state_that_does_not_fit_is_refused_before_writing(
    checkpoint: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], name: str, word: str
):
    rewrite_state(checkpoint, change)
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=word) as caught:
        export_hf(checkpoint=checkpoint, out=tmp_path / "hf", part=Part.all)
    assert name in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["missing", "short", "evil"])
def test_a_damaged_state_is_refused_before_writing(checkpoint: Path, tmp_path: Path, damage: str):
    (file,) = (checkpoint / layout.STATE).glob("*.distcp")
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        torch.save({"x": Path}, checkpoint / layout.STATE / "common.pt")
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="is missing" if damage == "missing" else "is not read"):
        export_hf(checkpoint=checkpoint, out=tmp_path / "hf", part=Part.all)
    assert set(tmp_path.iterdir()) == before


def test_a_flipped_tensor_is_refused_before_import_writes(tmp_path: Path):
    llm, tower = write_folders(tmp_path)
    name = "model.layers.1.mlp.gate_proj.weight"
    rewrite_tensors(llm, lambda ts: ts | {name: ts[name].T})
    with pytest.raises(WeightsError, match=r"gate_proj.*have shapes \[\(64, 96\)"):
        import_folders(llm, tower, tmp_path / "ckpt", SMALL)
    assert not (tmp_path / "ckpt").exists()


def test_one_checkpoint_tensor_has_one_dtype(tmp_path: Path):
    llm, tower = write_folders(tmp_path)
    name = "model.layers.1.self_attn.v_proj.weight"
    rewrite_tensors(llm, lambda ts: ts | {name: ts[name].bfloat16()})
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.v_proj\.weight is torch\.bfloat16"):
        import_folders(llm, tower, tmp_path / "ckpt", SMALL)


def test_decoder_and_tower_may_be_of_different_dtypes(tmp_path: Path):
    """As published: Qwen3 in BF16, SigLIP2 in FP32."""
    llm, tower = tmp_path / "llm", tmp_path / "tower"
    write_llm(llm, dtype=torch.bfloat16, num_hidden_layers=2)
    write_tower(tower, dtype=torch.float32, num_hidden_layers=2)
    import_folders(llm, tower, tmp_path / "ckpt", SMALL)
    export_hf(checkpoint=tmp_path / "ckpt", out=tmp_path / "hf", part=Part.all)
    tensors = folder_tensors(tmp_path / "hf")
    assert {t.dtype for n, t in tensors.items() if ".vision_tower." in n} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if ".vision_tower." not in n} == {torch.bfloat16}
    import_folders(tmp_path / "hf", tmp_path / "hf", tmp_path / "again")
    assert tensor_differences(tmp_path / "ckpt" / layout.STATE, tmp_path / "again" / layout.STATE, 0) == []


# Our own exports as sources.


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_an_export_is_imported_whole(tmp_path: Path, feature_layer: int):
    """Same tensors, same architecture, the trained connector included."""
    options = [
        *SMALL,
        f"{CONNECTOR}latent_init=learned",
        f"{CONNECTOR}ffn_multiplier=2",
        f"modality.image.encoder.feature_layer={feature_layer}",
    ]
    with mock.patch("qwen3_vlm.convert.hf.fresh_connector", random_connector):
        import_folders(*write_folders(tmp_path), tmp_path / "ckpt", options)
    export_hf(checkpoint=tmp_path / "ckpt", out=tmp_path / "hf", part=Part.all, max_shard_bytes=100_000)
    report = import_folders(tmp_path / "hf", tmp_path / "hf", tmp_path / "again")
    assert report == {str(tmp_path / "hf"): ["preprocessor_config.json: auto_map"]}
    assert tensor_differences(tmp_path / "ckpt" / layout.STATE, tmp_path / "again" / layout.STATE, 0) == []
    first, second = (layout.read_architecture(tmp_path / name) for name in ("ckpt", "again"))
    assert replace(second.model, name=first.model.name) == first.model
    assert second.modality == first.modality


def test_a_half_of_an_export_is_taken_with_a_fresh_connector(original: Path, exported: Path, tmp_path: Path):
    """What is not taken is listed."""
    report = import_folders(exported, original / "tower", tmp_path / "llm", SMALL)
    parts = {name.rsplit(".", 1)[0].split(".")[1] for name in report[str(exported)]}  # preprocessor_config is not taken
    assert parts == {"vision_tower", "resampler", "projector"}
    report = import_folders(original / "llm", exported, tmp_path / "vision", SMALL)
    assert report[str(exported)].pop() == "preprocessor_config.json: auto_map"
    parts = {name.split(".")[1] for name in report[str(exported)]}
    assert parts == {"language_model", "weight", "resampler", "projector"}  # "weight" is lm_head's
    for name in ("llm", "vision"):
        different = tensor_differences(original / "ckpt" / layout.STATE, tmp_path / name / layout.STATE, 0)
        assert different and all(".resampler." in d.name or ".projector." in d.name for d in different)


def test_a_trained_connector_is_what_it_is(exported: Path, tmp_path: Path):
    import_folders(exported, exported, tmp_path / "ckpt", [f"{CONNECTOR}num_tokens=4"])
    with pytest.raises(ConfigError, match=r"num_tokens 4; .*num_tokens=9"):
        import_folders(exported, exported, tmp_path / "other", [f"{CONNECTOR}num_tokens=9"])
    with pytest.raises(ConfigError, match="feature_layer -1"):
        import_folders(exported, exported, tmp_path / "other", ["modality.image.encoder.feature_layer=-2"])


def test_an_unknown_tensor_of_an_export_is_refused(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "hf")
    rewrite_tensors(tmp_path / "hf", lambda ts: ts | {"model.resampler.extra": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"unused \['model\.resampler\.extra'\]"):
        import_folders(tmp_path / "hf", tmp_path / "hf", tmp_path / "ckpt")


def test_an_export_without_its_description_is_refused(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "hf")
    rewrite_config(tmp_path / "hf", resampler_latent_init="random")
    with pytest.raises(WeightsError, match="does not describe the resampler"):
        import_folders(tmp_path / "hf", tmp_path / "hf", tmp_path / "ckpt")
    rewrite_config(tmp_path / "hf", text_config=None)
    with pytest.raises(WeightsError, match="no text_config"):
        import_folders(tmp_path / "hf", tmp_path / "hf", tmp_path / "ckpt")


# The folder.


def test_the_folder_is_complete(exported: Path, original: Path):
    names = {path.name for path in exported.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "model.safetensors",
    }
    code = {value.split(".")[0] for value in json.loads((exported / "config.json").read_text())["auto_map"].values()}
    assert {f"{module}.py" for module in code} <= names
    stops = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert tokens_of(exported, stops) == ["<|im_end|>", "<|endoftext|>"]
    text = "".join(path.read_text() for path in exported.iterdir() if path.suffix in (".json", ".md", ".py"))
    assert str(original) not in text  # no path of this machine


def test_a_taken_folder_is_refused(exported: Path, original: Path):
    before = folder_tensors(exported)
    with pytest.raises(ConfigError, match="not empty"):
        export_hf(checkpoint=original / "ckpt", out=exported, part=Part.llm)
    assert_equal(folder_tensors(exported), before)


@pytest.mark.parametrize("folder", ["hf", "hf.partial"])
def test_folders_of_users_stay(original: Path, tmp_path: Path, folder: str):
    thesis = tmp_path / folder / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(ConfigError, match=rf"{folder} exists and is not empty"):
        export_hf(checkpoint=original / "ckpt", out=tmp_path / "hf", part=Part.llm)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [thesis]


@pytest.mark.parametrize("kind", ["empty", "link", "link to nothing", "here"])
def test_an_empty_folder_is_filled(
    original: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """It may be a mount point, over which nothing can be moved: it is the same folder before and after."""
    disk = tmp_path / "disk"
    if kind != "link to nothing":
        disk.mkdir()
    before = disk.stat().st_ino if disk.exists() else None
    out = disk
    if kind.startswith("link"):
        out = tmp_path / "out"
        out.symlink_to(disk)
    elif kind == "here":
        monkeypatch.chdir(disk)
        out = Path()
    export_hf(checkpoint=original / "ckpt", out=out, part=Part.all)
    assert_equal(folder_tensors(disk), folder_tensors(exported))
    assert before in (None, disk.stat().st_ino) and not (disk / MARKER).exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"disk", "out"}


def test_an_empty_folder_is_empty_again_after_a_failure(original: Path, tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "ckpt").mkdir()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with mock.patch("shutil.disk_usage", return_value=usage):
        with pytest.raises(DiskFullError):
            export_hf(checkpoint=original / "ckpt", out=tmp_path / "hf", part=Part.all)
        with pytest.raises(DiskFullError):
            import_folders(original / "llm", original / "tower", tmp_path / "ckpt", SMALL)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["ckpt", "hf"]


def test_a_file_is_no_folder(original: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "hf"):
        with pytest.raises(ConfigError, match=r"is a file|Not a directory"):
            export_hf(checkpoint=original / "ckpt", out=out, part=Part.all)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_trainings_are_told_by_every_later_export(original: Path, checkpoint: Path, tmp_path: Path):
    """A run's checkpoint, exported, imported and exported again: both cards name the training and its data."""
    manifest = layout.read_manifest(checkpoint)
    config = {
        "train": {"trainable": ["decoder", "image.projector"], "global_batch_size": 8, "seq_length": 64},
        "optim": {"lr": 2e-5},
        "precision": {"name": "bf16"},
        "data": {"path": "/secret/pairs"},
    }
    layout.write_manifest(
        checkpoint, replace(manifest, step=7, config=manifest.config | config, progress={"samples": 55})
    )
    export_hf(checkpoint=checkpoint, out=tmp_path / "hf", part=Part.all)
    import_folders(tmp_path / "hf", tmp_path / "hf", tmp_path / "again")
    assert layout.read_history(tmp_path / "again") == layout.trainings(checkpoint) != []
    for part in Part:
        export_hf(checkpoint=tmp_path / "again", out=tmp_path / f"hf_{part.value}", part=part)
        card = (tmp_path / f"hf_{part.value}" / "README.md").read_text()
        for words in ("decoder, image.projector: 7 steps of 8 rows of 64 tokens (55 samples of pairs)", "2e-05"):
            assert words in card
        assert "secret" not in card and "an import" not in card


def test_a_fresh_import_says_so(original: Path, tmp_path: Path):
    export_hf(checkpoint=original / "ckpt", out=tmp_path / "llm", part=Part.llm)
    assert "- none: an import" in (tmp_path / "llm" / "README.md").read_text()
    assert not (tmp_path / "llm" / layout.HISTORY).exists()


# Safety.


def test_import_runs_no_code_of_a_folder(topology: Topology, tmp_path: Path):
    """A model folder with code that every trust_remote_code=True would run."""
    llm, tower = write_folders(tmp_path)
    proof = tmp_path / "executed"
    for folder in (llm, tower):
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Evil: pass\n")
        auto_map = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (folder / name).is_file():
                content = json.loads((folder / name).read_text())
                (folder / name).write_text(json.dumps(content | {"auto_map": auto_map}))
    report = import_folders(llm, tower, tmp_path / "ckpt", SMALL)
    assert "tokenizer_config.json: auto_map" in report[str(llm)]
    assert "preprocessor_config.json: auto_map" in report[str(tower)]
    modalities = build_modalities(layout.read_architecture(tmp_path / "ckpt").modality)
    ChatTokenizer.from_folder(tmp_path / "ckpt" / layout.PROCESSOR, modalities)
    export_hf(checkpoint=tmp_path / "ckpt", out=tmp_path / "hf", part=Part.all)
    assert not proof.exists()
    for folder in (tmp_path / "ckpt", tmp_path / "hf"):
        assert not [file for file in folder.rglob("*.json") if "evil.Evil" in file.read_text()]
    assert not list((tmp_path / "ckpt").rglob("*.py")) and not (tmp_path / "hf" / "evil.py").exists()
    assert not [path for path in (tmp_path / "hf").glob("*.json") if "evil" in path.read_text()]


# Whole or not at all.


def killed_during(work: Callable[[], object]) -> None:
    """Run in a forked process that is killed by SIGKILL in the middle of writing tensors."""
    child = os.fork()
    if child == 0:
        calls = iter(range(20))

        def add(self: object, num_bytes: int) -> None:
            if next(calls, None) == 15:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with mock.patch.object(progress.ByteProgress, "add", add):
                work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_import_leaves_no_checkpoint(original: Path, tmp_path: Path):
    out = tmp_path / "ckpt"
    killed_during(lambda: import_folders(original / "llm", original / "tower", out, SMALL))
    assert list(out.rglob("*.distcp"))  # it was in the middle
    with pytest.raises(CheckpointError):
        layout.resolve(out)
    with pytest.raises(CheckpointError):
        StateReader(out / layout.STATE)
    import_folders(original / "llm", original / "tower", out, SMALL)
    layout.resolve(out)


def test_a_killed_export_leaves_no_folder(original: Path, exported: Path, tmp_path: Path):
    out = tmp_path / "hf"
    killed_during(lambda: export_hf(checkpoint=original / "ckpt", out=out, part=Part.all))
    assert not out.exists()
    assert {path.name for path in (tmp_path / "hf.partial").iterdir()} == {MARKER, "model.safetensors"}
    export_hf(checkpoint=original / "ckpt", out=out, part=Part.all)
    assert_equal(folder_tensors(out), folder_tensors(exported))
    assert not (tmp_path / "hf.partial").exists() and not (out / MARKER).exists()


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("when", ["at once", "in the end", "no space"])
def test_a_full_disk_is_a_clear_error(original: Path, tmp_path: Path, command: str, when: str):
    def work() -> object:
        if command == "import":
            return import_folders(original / "llm", original / "tower", tmp_path / "out", SMALL)
        return export_hf(checkpoint=original / "ckpt", out=tmp_path / "out", part=Part.all)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    usage = shutil.disk_usage(tmp_path)
    failure = {
        "at once": lambda: mock.patch("shutil.disk_usage", return_value=usage._replace(free=1000)),
        "in the end": lambda: files_of_at_most(200_000),
        "no space": lambda: mock.patch.object(progress.ByteProgress, "add", no_space),
    }[when]
    with failure(), pytest.raises(DiskFullError) as caught:
        work()
    words = {"at once": "has 0.0 GB left", "in the end": "File too large", "no space": "No space left on device"}
    assert words[when] in str(caught.value) and "make room" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    work()  # with room again


def test_another_failure_leaves_nothing_either(original: Path, tmp_path: Path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with mock.patch.object(progress.ByteProgress, "add", interrupted), pytest.raises(KeyboardInterrupt):
        export_hf(checkpoint=original / "ckpt", out=tmp_path / "out", part=Part.all)
    assert list(tmp_path.iterdir()) == []


# Layouts.


def test_a_model_in_blocks_is_the_same_model(cases: dict[str, Case], topology: Topology, tmp_path: Path):
    """Blocks of a few rows load through megatron-core as whole tensors do."""
    case = cases["kv1_tied"]
    export_hf(checkpoint=case.checkpoint, out=tmp_path / "hf", part=Part.all)
    with mock.patch.object(hf, "BLOCK_BYTES", 1000):
        import_folders(tmp_path / "hf", tmp_path / "hf", tmp_path / "ckpt")
    again = Case(tmp_path, case.spec)
    expected = case.load(ParallelConfig(), topology).model.state_dict()
    found = again.load(ParallelConfig(), topology).model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if isinstance(value, Tensor))


def test_sizes_are_read_back_from_a_whole_siglip(tmp_path: Path):
    """The forms of a tower folder differ, the export does not."""
    llm = tmp_path / "llm"
    write_llm(llm, num_hidden_layers=2)
    write_siglip(tmp_path / "siglip")
    import_folders(llm, tmp_path / "siglip", tmp_path / "ckpt", SMALL)
    export_hf(checkpoint=tmp_path / "ckpt", out=tmp_path / "hf", part=Part.all)
    _, first = architecture_of(llm, tmp_path / "siglip", SMALL)
    _, second = architecture_of(tmp_path / "hf", tmp_path / "hf", [])
    assert first == second
