"""import_hf: bit-exact, strict about what a folder holds, and plain about what it drops."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor

from qwen3_vlm.checkpoint import layout
from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.convert.architecture import architecture_of
from qwen3_vlm.convert.mapping import Entry, decoder_entries, siglip_entries
from qwen3_vlm.errors import ConfigError, WeightsError
from qwen3_vlm.parallel.topology import Topology
from tests.cases import Case
from tests.hf_folders import import_folders, rewrite_config, rewrite_tensors, write_llm, write_siglip, write_tower

Tensors = dict[str, Tensor]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A decoder and a tower, small enough to write for every test."""
    write_llm(tmp_path / "llm", num_hidden_layers=2)
    write_tower(tmp_path / "tower", num_hidden_layers=2)
    return tmp_path / "llm", tmp_path / "tower"


def theirs_of(entries: list[Entry], stored: Tensors) -> Tensors:
    """Checkpoint tensors put back into Hugging Face's form by the table's own inverses."""
    theirs: Tensors = {}
    for entry in entries:
        for layer in entry.layers():
            ours = stored[entry.ours] if layer is None else stored[entry.ours][layer]
            theirs |= dict(zip(entry.their_names(layer), entry.to_theirs(ours), strict=True))
    return theirs


def vision_tensors(folder: Path) -> Tensors:
    """A tower folder's tensors without prefix and pooling head."""
    tensors = {name.removeprefix("vision_model."): t for name, t in load_file(folder / "model.safetensors").items()}
    return {name: t for name, t in tensors.items() if not name.startswith("head.")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_tensor_is_kept_bit_for_bit(topology: Topology, tmp_path: Path, dtype: torch.dtype, tied: bool):
    llm, tower = tmp_path / "llm", tmp_path / "tower"
    write_llm(llm, dtype=dtype, num_hidden_layers=2, tie_word_embeddings=tied)
    write_tower(tower, dtype=dtype, num_hidden_layers=2)
    import_folders(llm, tower, tmp_path / "ckpt")
    stored: dict[str, Any] = dist_checkpointing.load_plain_tensors(str(tmp_path / "ckpt" / layout.STATE))
    decoder, modalities = architecture_of(llm, tower, [])
    entries = {llm: decoder_entries(decoder), tower: siglip_entries(modalities["image"].encoder, "towers.image.")}
    expected = {llm: load_file(llm / "model.safetensors"), tower: vision_tensors(tower)}
    for folder, table in entries.items():
        theirs = theirs_of(table, stored)
        assert theirs.keys() == expected[folder].keys()
        for name, tensor in theirs.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[folder][name]), name
    connector = {name for name in stored if ".resampler." in name or ".projector." in name}
    assert set(stored) == connector | {entry.ours for table in entries.values() for entry in table}
    assert {stored[name].dtype for name in connector} == {dtype}


@pytest.mark.parametrize("form", ["plain", "prefixed", "whole siglip"])
def test_forms_of_a_siglip_folder_are_the_same_tower(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], form: str
):
    """Keys with and without `vision_model.`, alone or beside a text tower: equal tensors; what is dropped is listed."""
    llm, _ = folders
    whole = write_siglip(tmp_path / "siglip")
    vision = {name: t for name, t in whole.state_dict().items() if name.startswith("vision_model.")}
    tower = tmp_path / "siglip"
    if form != "whole siglip":
        tower = tmp_path / "vision"
        write_tower(tower)
        prefix = "vision_model." if form == "prefixed" else ""
        rewrite_tensors(tower, lambda _: {prefix + name.removeprefix("vision_model."): t for name, t in vision.items()})
    report = import_folders(llm, tower, tmp_path / "ckpt")
    stored: dict[str, Any] = dist_checkpointing.load_plain_tensors(str(tmp_path / "ckpt" / layout.STATE))
    _, modalities = architecture_of(llm, tower, [])
    theirs = theirs_of(siglip_entries(modalities["image"].encoder, "towers.image."), stored)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, vision[f"vision_model.{name}"]), name
    kept = {f"vision_model.{name}" for name in theirs}
    if form == "whole siglip":
        assert sorted(report[str(tower)]) == sorted(set(whole.state_dict()) - kept)
        assert any(name.startswith("text_model.") for name in report[str(tower)])
    else:
        assert report[str(tower)] and all("head." in name for name in report[str(tower)])
    assert report[str(llm)] == []


def test_layer_minus_two_drops_the_last_layer(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    llm, tower = folders
    report = import_folders(llm, tower, tmp_path / "ckpt", ["modality.image.encoder.feature_layer=-2"])
    dropped = [name.removeprefix("vision_model.") for name in report[str(tower)]]
    assert {name for name in dropped if not name.startswith("head.")} == {
        name for name in vision_tensors(tower) if name.startswith(("encoder.layers.1.", "post_layernorm."))
    }


def test_a_stored_head_of_a_tied_model_is_dropped_by_name(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path]
):
    llm, tower = tmp_path / "tied", folders[1]
    write_llm(llm, num_hidden_layers=2, tie_word_embeddings=True)
    rewrite_tensors(llm, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert import_folders(llm, tower, tmp_path / "ckpt")[str(llm)] == ["lm_head.weight"]


@pytest.mark.parametrize("change", [lambda e: e + 1, lambda e: e[:-1].clone()], ids=["values", "shape"])
def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], change: Callable[[Tensor], Tensor]
):
    llm, tower = tmp_path / "tied", folders[1]
    write_llm(llm, num_hidden_layers=2, tie_word_embeddings=True)
    rewrite_tensors(llm, lambda t: t | {"lm_head.weight": change(t["model.embed_tokens.weight"])})
    with pytest.raises(WeightsError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        import_folders(llm, tower, tmp_path / "ckpt")


def test_two_names_of_one_tensor_are_refused(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    llm, tower = folders
    name = "embeddings.patch_embedding.bias"
    rewrite_tensors(
        tower,
        lambda ts: ts | {n + name: torch.full((48,), float(len(n))) for n in ("", "vision_model.")},
    )
    with pytest.raises(WeightsError, match=rf"{tower}: {name} and vision_model\.{name} are the same tensor"):
        import_folders(llm, tower, tmp_path / "ckpt")


def test_a_decoder_has_no_vision_prefix(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    llm, tower = folders
    rewrite_tensors(llm, lambda ts: {f"vision_model.{name}": t for name, t in ts.items()})
    with pytest.raises(WeightsError, match=r"unused \['vision_model\."):
        import_folders(llm, tower, tmp_path / "ckpt")


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def with_extra(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(2)}


def misshapen(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name][:-1]}


NORM, KEY, EXTRA = (
    "model.layers.1.self_attn.q_norm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.extra.bias",
)


@pytest.mark.parametrize(
    ("change", "name", "word"),
    [
        (without(NORM), NORM, "missing"),
        (with_extra(EXTRA), EXTRA, "unused"),
        (misshapen(KEY), KEY, "shapes"),
        (misshapen("model.norm.weight"), "model.norm.weight", "shapes"),
    ],
    ids=["missing", "unused", "part of a fused tensor", "plain tensor"],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], change: Callable, name: str, word: str
):
    llm, tower = folders
    rewrite_tensors(llm, change)
    with pytest.raises(WeightsError) as caught:
        import_folders(llm, tower, tmp_path / "ckpt")
    assert name in str(caught.value) and word in str(caught.value) and str(llm) in str(caught.value)
    assert not (tmp_path / "ckpt").exists()


def test_the_towers_tensors_are_checked_too(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    llm, tower = folders
    rewrite_tensors(tower, with_extra("encoder.layers.9.mlp.fc1.bias"))
    with pytest.raises(WeightsError, match=r"unused .*encoder\.layers\.9\.mlp\.fc1\.bias"):
        import_folders(llm, tower, tmp_path / "ckpt")


def test_pickled_weights_are_not_read(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    llm, tower = folders
    (llm / "model.safetensors").unlink()
    (llm / "pytorch_model.bin").write_bytes(b"\x80\x04never unpickled")
    with pytest.raises(WeightsError, match=r"model\.safetensors.*\.bin"):
        import_folders(llm, tower, tmp_path / "ckpt")


def test_an_index_names_only_files_of_its_folder(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    llm, tower = folders
    index = '{"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}'
    (llm / "model.safetensors.index.json").write_text(index)
    (llm / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"\.\./elsewhere\.safetensors"):
        import_folders(llm, tower, tmp_path / "ckpt")


@pytest.mark.parametrize(("side", "model_type"), [("llm", "llama"), ("tower", "clip_vision_model")])
def test_another_architecture_is_refused(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], side: str, model_type: str
):
    rewrite_config(tmp_path / side, model_type=model_type)
    with pytest.raises(WeightsError, match=f"{side}/config.json has model_type '{model_type}'"):
        import_folders(*folders, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_normalize", False),
        ("rescale_factor", 1.0),
        ("size", {"shortest_edge": 36}),
        ("resample", 0),
        ("do_center_crop", True),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_mean", None),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, 0.5, "0.5"]),
    ],
)
def test_another_image_preparation_is_refused(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], key: str, value: object
):
    file = folders[1] / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(WeightsError, match=key):
        import_folders(*folders, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("side", "key", "value"),
    [
        ("llm", "hidden_size", "64"),
        ("llm", "hidden_size", 0),
        ("llm", "num_key_value_heads", 0),
        ("llm", "num_key_value_heads", 3),
        ("llm", "num_hidden_layers", None),
        ("llm", "num_hidden_layers", -1),
        ("llm", "rms_norm_eps", None),
        ("tower", "num_hidden_layers", -1),
        ("tower", "num_attention_heads", 7),
        ("tower", "num_channels", 1),
        ("tower", "vision_config", None),
        ("tower", "feature_layer", 0),
        ("tower", "feature_layer", -3),
        ("tower", "feature_layer", "-1"),
    ],
)
def test_sizes_that_no_model_has_are_refused_by_name(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], side: str, key: str, value: object
):
    rewrite_config(tmp_path / side, **{key: value})
    named = "SiglipVisionConfig" if key == "vision_config" else key
    with pytest.raises((WeightsError, ConfigError), match=named) as caught:
        import_folders(*folders, tmp_path / "ckpt")
    assert "\n" not in str(caught.value) and not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    "override",
    ["resampler.num_tokens=0", "resampler.depth=0", "resampler.num_tokens=-4", "encoder.feature_layer=-3"],
)
def test_a_connector_that_cannot_be_is_refused(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], override: str
):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        import_folders(*folders, tmp_path / "ckpt", [f"modality.image.{override}"])
    assert not (tmp_path / "ckpt").exists()


def test_double_precision_is_refused(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    rewrite_tensors(folders[0], lambda ts: {name: t.double() for name, t in ts.items()})
    with pytest.raises(WeightsError, match="is F64"):
        import_folders(*folders, tmp_path / "ckpt")


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def drop_token(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|image_pad|>"]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("tokenizer.json", drop_token, r"<\|image_pad\|>"),
        ("tokenizer.json", lambda c: c.clear(), "make no tokenizer"),
        ("tokenizer_config.json", lambda c: c.update(tokenizer_class="EvilTokenizer"), "EvilTokenizer.*no fast"),
        ("tokenizer_config.json", lambda c: c.update(tokenizer_class=3), "tokenizer_class 3"),
        ("config.json", None, "vocab_size 260"),
    ],
    ids=["a token of the grammar", "garbage", "code of its own", "class", "ids beyond the embedding"],
)
def test_a_tokenizer_that_no_run_can_use_is_refused(
    topology: Topology, tmp_path: Path, file: str, change: Callable | None, words: str
):
    llm, tower = tmp_path / "llm", tmp_path / "tower"
    write_llm(llm, num_hidden_layers=2, **({} if change else {"vocab_size": 260}))
    write_tower(tower, num_hidden_layers=2)
    if change:
        change_json(llm / file, change)
    with pytest.raises(WeightsError, match=words) as caught:
        import_folders(llm, tower, tmp_path / "ckpt")
    assert str(llm) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_of_garbage_are_refused(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], file: str
):
    (folders[0] / file).write_bytes(b"\xffgarbage")
    with pytest.raises(WeightsError, match=file):
        import_folders(*folders, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("key", ["attention_bias", "use_sliding_window"])
def test_variants_that_the_decoder_does_not_compute_are_refused(
    topology: Topology, tmp_path: Path, folders: tuple[Path, Path], key: str
):
    rewrite_config(folders[0], **{key: True})
    with pytest.raises(WeightsError, match=key):
        import_folders(*folders, tmp_path / "ckpt")


def test_a_named_model_must_be_the_folders(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    with pytest.raises(ConfigError, match=r"not model=tiny: .*hidden_size: 128 in model=tiny, 64 in the folder"):
        import_folders(*folders, tmp_path / "ckpt", ["model=tiny"])


def test_architecture_is_read_back_from_the_checkpoint(cases: dict[str, Case], topology: Topology):
    case = cases["n20_learned_layer_2"]
    architecture = layout.read_architecture(case.checkpoint)
    decoder, modalities = architecture_of(case.folder / "llm", case.folder / "tower", [])
    image = architecture.modality["image"]
    assert architecture.model == decoder
    assert image.encoder == replace(modalities["image"].encoder, feature_layer=-2)
    assert image.resampler.num_tokens == 20 and image.resampler.latent_init.value == "learned"


def test_a_seed_gives_the_same_checkpoint(topology: Topology, tmp_path: Path, folders: tuple[Path, Path]):
    for name in ("a", "b"):
        import_folders(*folders, tmp_path / name)
    a, b = (dist_checkpointing.load_plain_tensors(str(tmp_path / name / layout.STATE)) for name in ("a", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_cases_connectors_are_no_fresh_ones(cases: dict[str, Case], topology: Topology):
    """The noise of `random_connector` reached the model: parity would else compare norms that are identities."""
    state = cases["kv1_tied"].load(ParallelConfig(), topology).model.state_dict()
    norm = state["towers.image.resampler.layers.0.feature_norm.weight"]
    assert (norm - 1).abs().min() > 0
