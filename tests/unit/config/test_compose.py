"""conf/ and a command line become the RunConfig that was asked for, or a ConfigError that helps."""

import shutil
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest
import yaml

from qwen3_vlm.config import compose as compose_module
from qwen3_vlm.config.compose import (
    compose,
    conf_dir,
    config_names,
    from_dict,
    group_options,
    modality_from_dict,
    parse_command_line,
    to_dict,
    to_yaml,
)
from qwen3_vlm.config.schema import ENCODERS, LatentInit, OnError, Resample, RunConfig
from qwen3_vlm.config.tree import known_keys
from qwen3_vlm.errors import ConfigError

STAGES = ["stage0_sanity", "stage1_align"]
REQUIRED = ["exp_dir=runs/x", "data.path=data/x"]
TINY = [*REQUIRED, "model=tiny", "modality=tiny", "precision=fp32"]


@dataclass(frozen=True, kw_only=True)
class ToyEncoderConfig:
    """An encoder of another modality."""

    kind: str = "toy"
    hidden_size: int = 8
    num_attention_heads: int = 2


@pytest.fixture
def toy_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "toy", ToyEncoderConfig)


@pytest.fixture
def own_conf(monkeypatch, tmp_path):
    """A copy of conf/ that a test may change."""
    copy = tmp_path / "conf"
    shutil.copytree(conf_dir(), copy)
    monkeypatch.setattr(compose_module, "conf_dir", lambda: copy)
    return copy


def refusal(*overrides: str, config_name: str = "stage1_align", **arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(config_name, [*REQUIRED, *overrides], **arguments)
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_composes_for_the_8b(stage):
    config = compose(stage, REQUIRED)
    assert (config.model.name, config.model.num_layers, config.model.vocab_size) == ("qwen3_8b", 36, 151936)
    assert config.modality["image"].encoder.resample is Resample.bilinear
    assert config.modality["image"].resampler.num_tokens == 64
    assert config.precision.params_dtype == "bf16"


def test_stages_train_what_the_recipe_says():
    assert compose("stage0_sanity", REQUIRED).train.trainable == ["image.projector"]
    stage1 = compose("stage1_align", REQUIRED)
    assert stage1.train.trainable == ["image.resampler", "image.projector"]
    assert (stage1.optim.lr, stage1.optim.decay, stage1.optim.warmup_fraction) == (1e-3, "cosine", 0.03)
    assert (stage1.optim.weight_decay, stage1.train.epochs) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group, options in group_options().items() for option in options]
)
def test_every_option_composes(group, option):
    if option == "from_checkpoint":
        pytest.skip("its own tests are below")
    compose("stage1_align", [*REQUIRED, f"{group}={option}"])


def test_the_names_of_all_options_and_keys_are_frozen():
    """Adding a knob is a decision: edit options.txt with it. (python -m pytest prints the difference.)"""
    names = [f"config: {name}" for name in config_names()]
    names += [f"option: {group}={option}" for group, options in group_options().items() for option in options]
    names += [f"key: {key}" for key in sorted(known_keys({"image": "siglip"}))]
    assert names == (Path(__file__).parent / "options.txt").read_text().splitlines()


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("model.hiden", "model.hidden_size"),
        ("modle.hidden_size", "model.hidden_size"),
        ("max_steps", "train.max_steps"),
        ("parallel.tensor_parallel", "parallel.sequence_parallel"),
        ("modality.image.resampler.num_token", "modality.image.resampler.num_tokens"),
        ("modality.image.encoder.image_sise", "modality.image.encoder.image_size"),
        ("modality.imge.resampler.num_tokens", "modality.image.resampler.num_tokens"),
        ("expdir", "exp_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(prefix, key, known):
    assert f"unknown key '{key}'; the nearest known key is '{known}'" in refusal(f"{prefix}{key}=9")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model=tinny", ["'tinny' of model", "nearest is 'tiny'", "qwen3_8b"]),
        ("model=[tiny]", ["only modality takes a list"]),
        ("~optim.lr", ["cannot be removed"]),
        ("optim.lr=1e-3,1e-4", ["several values"]),
        ("model@other=tiny", ["cannot be moved"]),
        ("data.path=a=b", ["cannot read", "quote"]),
        ("train={max_steps: 3}", ["of train"]),
        ("modality=[siglip2_so400m_384,tiny]", ["siglip2_so400m_384", "tiny", "both define 'image'"]),
        ("train.max_steps=1.5", ["train.max_steps: expected int", "1.5"]),
        ("train.max_steps=ten", ["train.max_steps: expected int", "'ten'"]),
        ("train.micro_batch_size=true", ["expected int", "bool"]),
        ("train.micro_batch_size=null", ["expected int", "None"]),
        ("parallel.sequence_parallel=1", ["expected bool", "int"]),
        ("optim.lr=high", ["optim.lr: expected float"]),
        ("exp_dir=3", ["exp_dir: expected str", "quote it"]),
        ("optim.decay=exp", ["one of cosine, linear, constant"]),
        ("precision.fp8_recipe=fast", ["delayed, tensorwise, blockwise"]),
        ("data.on_error=ignore", ["one of skip, raise"]),
        ("train.trainable=image.projector", ["a list of str"]),
        ("train.trainable=[image.projector,3]", ["train.trainable[1]"]),
        ("modality.image.encoder.image_mean=[0.5,0.5]", ["a list of 3 float"]),
        ("modality.image.resampler={num_tokns: 3}", ["modality.image.resampler.num_tokens"]),
        ("modality.image.resampler=3", ["a mapping"]),
        ("modality.image.encoder.kind=clip", ["'clip'", "siglip"]),
        ("data.path=${nowhere}", ["nowhere"]),
    ],
)
def test_a_bad_override_is_explained(override, parts):
    message = refusal(override)
    for part in parts:
        assert part in message


def test_an_unknown_config_names_the_known_ones():
    assert "known configs: stage0_sanity, stage1_align, train" in refusal(config_name="stage1")


def test_an_option_chosen_twice_is_refused():
    assert "model is chosen 2 times" in refusal("model=tiny", "model=qwen3_4b")


def test_required_values_are_named_all_at_once():
    with pytest.raises(ConfigError, match=r"not set: exp_dir, data.path; .*exp_dir=\.\.\."):
        compose("stage1_align", [])


def test_a_key_that_no_yaml_mentions_can_be_set_with_and_without_plus():
    for prefix in ("", "+", "++"):
        config = compose("stage1_align", [*REQUIRED, f"{prefix}train.max_steps=7", f"{prefix}train.seed=3"])
        assert (config.train.max_steps, config.train.seed) == (7, 3)


def test_values_take_the_schemas_types():
    config = compose(
        "stage1_align",
        [
            *REQUIRED,
            "data.on_error=raise",
            "optim.lr=1",
            "modality.image.resampler.latent_init=learned",
            "modality.image.encoder.image_std=[1,1,1]",
            "checkpoint.init_from='a=b'",
        ],
    )
    assert config.data.on_error is OnError.raise_
    assert isinstance(config.optim.lr, float)
    assert config.modality["image"].resampler.latent_init is LatentInit.learned
    assert config.modality["image"].encoder.image_std == (1.0, 1.0, 1.0)
    assert config.checkpoint.init_from == "a=b"
    with pytest.raises(FrozenInstanceError):
        config.optim.lr = 2.0  # type: ignore[misc]


def test_an_unknown_key_in_a_conf_file_names_the_nearest_one(own_conf):
    (own_conf / "optim" / "own.yaml").write_text("weight_decy: 0.1\n")
    assert "'optim.weight_decy'; the nearest known key is 'optim.weight_decay'" in refusal("optim=own")


def test_several_modalities_are_a_list_of_options(own_conf, toy_encoder):
    (own_conf / "modality" / "sound.yaml").write_text("sound: {encoder: {kind: toy, hidden_size: 16}}\n")
    config = compose(
        "stage1_align", [*REQUIRED, "modality=[tiny,sound]", "modality.sound.encoder.num_attention_heads=4"]
    )
    assert list(config.modality) == ["image", "sound"]
    assert config.modality["sound"].encoder == ToyEncoderConfig(hidden_size=16, num_attention_heads=4)
    assert config.modality["sound"].resampler.num_tokens == 64


def test_a_modality_can_be_defined_on_the_command_line(toy_encoder):
    config = compose("stage1_align", [*TINY, "modality.sound.encoder.kind=toy", "modality.sound.encoder.hidden_size=4"])
    assert config.modality["sound"].encoder == ToyEncoderConfig(hidden_size=4)
    message = refusal("modality.sound.encoder.kind=toy", "modality.sound.encoder.hiden_size=1")
    assert "the nearest known key is 'modality.sound.encoder.hidden_size'" in message


@pytest.mark.parametrize("stage", STAGES)
def test_a_config_survives_dict_and_yaml(stage):
    config = compose(stage, [*REQUIRED, "data.on_error=raise", "train.max_steps=5", "precision=fp8_delayed"])
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_a_stored_dict_is_read_strictly():
    tree = to_dict(compose("stage1_align", REQUIRED))
    tree["train"]["sed"] = 1
    with pytest.raises(ConfigError, match=r"'train.sed'.*'train.seed'"):
        from_dict(tree)
    with pytest.raises(ConfigError, match=r"modality.image.encoder.kind is '\?\?\?'"):
        modality_from_dict({"image": {}})


def from_checkpoint(*overrides: str, name: str = "stage1_align") -> RunConfig:
    """Compose with model=from_checkpoint; the checkpoint at `ckpt` holds the tiny model with 16 visual tokens."""

    def read_architecture(path: str) -> RunConfig:
        assert path == "ckpt"
        return compose("stage1_align", [*TINY, "modality.image.resampler.num_tokens=16"])

    overrides = (*REQUIRED, "model=from_checkpoint", "checkpoint.init_from=ckpt", *overrides)
    return compose(name, overrides, read_architecture=read_architecture)


def test_the_checkpoint_decides_the_model():
    config = from_checkpoint()
    tiny = compose("stage1_align", [*TINY, "modality.image.resampler.num_tokens=16"])
    assert (config.model, config.modality) == (tiny.model, tiny.modality)
    assert config.optim == tiny.optim


@pytest.mark.parametrize(
    "override",
    [
        "model.num_layers=4",
        "model.rope_theta=1000000",
        "modality.image.resampler.num_tokens=16",
        "modality.image.resampler.latent_init=pooled",
    ],
)
def test_an_override_that_agrees_with_the_checkpoint_is_accepted(override):
    assert from_checkpoint(override) == from_checkpoint()


@pytest.mark.parametrize(
    ("override", "key", "asked", "stored"),
    [
        ("model.num_layers=36", "model.num_layers", "36", "4"),
        ("modality.image.resampler.num_tokens=64", "modality.image.resampler.num_tokens", "64", "16"),
        ("modality=tiny", "modality.image.resampler.num_tokens", "9", "16"),
        ("modality=siglip2_so400m_384", "modality.image.encoder.image_size", "384", "36"),
        ("modality.image={resampler: {depth: 5}}", "modality.image.resampler.depth", "5", "2"),
    ],
)
def test_an_override_that_disagrees_with_the_checkpoint_names_both_values(override, key, asked, stored):
    with pytest.raises(ConfigError) as caught:
        from_checkpoint(override)
    assert f"{key} is {asked} on the command line and {stored} in checkpoint.init_from=ckpt" in str(caught.value)


def test_from_checkpoint_needs_a_checkpoint_and_a_reader():
    assert "add checkpoint.init_from=CKPT" in refusal("model=from_checkpoint")
    assert "choose model=" in refusal("model=from_checkpoint", "checkpoint.init_from=ckpt")
    assert "model is chosen 2 times" in refusal("model=from_checkpoint", "model=tiny", "checkpoint.init_from=ckpt")


def test_the_command_line_is_made_fit_for_hydra():
    line = parse_command_line(["--config-name", "stage1_align", "train.max_steps=3", "+train.seed=4", "model=tiny"])
    assert (line.config_name, line.shows) == ("stage1_align", False)
    assert line.overrides == ["train.max_steps=3", "+train.seed=4", "model=tiny"]
    expected = ["--config-name", "stage1_align", "++train.max_steps=3", "++train.seed=4", "model=tiny"]
    assert line.hydra_argv == expected


def test_overrides_may_stand_before_options():
    line = parse_command_line(["model=tiny", "--config-name=stage0_sanity", "train.seed=4"])
    assert (line.config_name, line.overrides) == ("stage0_sanity", ["model=tiny", "train.seed=4"])


@pytest.mark.parametrize(
    ("argv", "flag"), [(["--help"], "--help"), (["--cfg", "job"], "--cfg=job"), (["--info"], "--info=all")]
)
def test_requests_to_show_are_left_to_hydra(argv, flag):
    line = parse_command_line(argv)
    assert line.shows
    assert flag in line.hydra_argv


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["model=tiny"], "give --config-name NAME, one of: stage0_sanity, stage1_align"),
        (["--config-name", "stage9"], "known configs"),
        (["--config-name", "stage1_align", "--multirun"], "unknown option '--multirun'"),
        (["--config-name", "stage1_align", "model.hiden=9"], "model.hidden_size"),
        (["--config-name"], "--config-name"),
    ],
)
def test_a_bad_command_line_is_explained(argv, part):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(argv)
    assert part in str(caught.value)


def test_parts_of_a_config_are_values():
    config = compose("stage1_align", REQUIRED)
    assert replace(config, optim=config.optim) == config
