"""Every rule refuses what breaks it, naming the keys and the numbers; sensible runs pass."""

from dataclasses import dataclass, replace

import pytest

from qwen3_vlm.config.compose import compose, group_options
from qwen3_vlm.config.schema import ENCODERS
from qwen3_vlm.config.validate import trainable_parts, validate
from qwen3_vlm.errors import ConfigError

REQUIRED = ["exp_dir=runs/x", "data.path=data/x"]
STAGES = ["stage0_sanity", "stage1_align"]
SIZES = [name for name in group_options()["model"] if name.startswith("qwen3_")]


def check(*overrides: str, world_size: int = 1, config_name: str = "stage1_align") -> None:
    validate(compose(config_name, [*REQUIRED, *overrides]), world_size)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_stage_runs_on_1_to_8_ranks(stage, world_size):
    check(world_size=world_size, config_name=stage)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_runs_at_the_layouts_of_one_node(size):
    for layout, world_size in [("single", 8), ("tp2", 8), ("pp2", 8), ("tp2pp2", 8), ("tp4pp2", 8), ("tp8", 8)]:
        check(f"model={size}", f"parallel={layout}", world_size=world_size)


@pytest.mark.parametrize("layout", group_options()["parallel"])
def test_every_layout_runs_the_32b(layout):
    sizes = compose("stage1_align", [*REQUIRED, f"parallel={layout}"]).parallel
    check("model=qwen3_32b", f"parallel={layout}", world_size=2 * sizes.tp * sizes.pp)


@pytest.mark.parametrize("precision", group_options()["precision"])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_every_precision_and_number_of_visual_tokens_runs(precision, tokens):
    check(f"precision={precision}", f"modality.image.resampler.num_tokens={tokens}", "parallel=tp2", world_size=8)


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "tp2pp2", "tp4"])
def test_the_tiny_model_runs_on_a_laptop(layout):
    check("model=tiny", "modality=tiny", "precision=fp32", f"parallel={layout}", "train=rows_2k", world_size=4)


def test_more_tensor_parallel_ranks_than_kv_groups_are_fine():
    check("model.num_query_groups=1", "parallel=tp2", world_size=2)
    check("model.num_query_groups=2", "parallel=tp8", world_size=8)


@pytest.mark.parametrize(
    ("overrides", "world_size", "rule"),
    [
        (["parallel.tp=0"], 1, "parallel.tp 0 must be at least 1"),
        (["parallel.pp=-1"], 1, "parallel.pp -1 must be at least 1"),
        (["parallel.cp=2"], 2, "parallel.cp 2: context parallelism is not implemented yet"),
        (["parallel.vpp=2"], 2, "parallel.vpp 2: the interleaved schedule is not implemented yet"),
        (["parallel=tp4pp2"], 12, "12 processes are not divisible by parallel.tp * pp * cp = 4 * 2 * 1 = 8"),
        (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel needs parallel.tp > 1"),
        (["parallel.tp=3"], 3, "model.num_attention_heads 32 is not divisible by parallel.tp 3"),
        (["model.num_query_groups=5"], 1, "model.num_attention_heads 32 is not divisible by model.num_query_groups 5"),
        (
            ["model.num_attention_heads=24", "model.num_query_groups=3", "parallel.tp=2"],
            2,
            "model.num_query_groups 3 and parallel.tp 2: neither is divisible by the other",
        ),
        (["model.ffn_hidden_size=12289", "parallel=tp2"], 2, "model.ffn_hidden_size 12289 is not divisible"),
        (["model.hidden_size=4097", "parallel=tp2"], 2, "model.hidden_size 4097 is not divisible by parallel.tp 2"),
        (["parallel.pp=5"], 5, "model.num_layers 36 is not divisible by parallel.pp 5"),
        (
            ["modality.image.encoder.num_attention_heads=9", "parallel=tp2"],
            2,
            "modality.image.encoder.num_attention_heads 9 is not divisible by parallel.tp 2",
        ),
        (
            ["modality.image.encoder.num_attention_heads=10"],
            1,
            "modality.image.encoder.hidden_size 1152 is not divisible by its num_attention_heads 10",
        ),
        (
            ["modality.image.encoder.ffn_hidden_size=4305", "parallel=tp2"],
            2,
            "modality.image.encoder.ffn_hidden_size 4305 is not divisible by parallel.tp 2",
        ),
        (["modality.image.encoder.patch_size=400"], 1, "patch_size 400 must be from 1 to image_size 384"),
        (["modality.image.encoder.feature_layer=0"], 1, "feature_layer 0 must be from -27 (num_layers) to -1"),
        (["modality.image.encoder.feature_layer=-28"], 1, "feature_layer -28 must be from -27"),
        (["modality.image.resampler.num_tokens=0"], 1, "modality.image.resampler.num_tokens 0 must be at least 1"),
        (["modality.image.resampler.num_tokens=4095"], 1, "do not fit a row of train.seq_length 4096"),
        (["modality.image.resampler.depth=0"], 1, "modality.image.resampler.depth 0 must be at least 1"),
        (["modality.image.resampler.ffn_multiplier=0"], 1, "resampler.ffn_multiplier 0 must be at least 1"),
        (
            ["train.global_batch_size=12", "train.micro_batch_size=2"],
            4,
            "train.global_batch_size 12 is not divisible by train.micro_batch_size 2 * 4 data-parallel ranks = 8",
        ),
        (["train.global_batch_size=0"], 1, "train.global_batch_size 0 must be at least 1"),
        (["train.micro_batch_size=0"], 1, "train.micro_batch_size 0 must be at least 1"),
        (["train.seq_length=0"], 1, "train.seq_length 0 must be at least 1"),
        (["train.seq_length=40000"], 1, "train.seq_length 40000 is above model.max_position_embeddings 32768"),
        (
            ["train.seq_length=4097", "parallel=tp2"],
            2,
            "train.seq_length * train.micro_batch_size = 4097 is not divisible by parallel.tp 2",
        ),
        (["train.max_steps=0"], 1, "train.max_steps 0 must be at least 1"),
        (["train.epochs=0"], 1, "train.epochs 0.0 must be above 0"),
        (["train.seed=-1"], 1, "train.seed -1 must not be negative"),
        (["train.trainable=[]"], 1, "train.trainable is empty"),
        (["train.trainable=[resampler]"], 1, "'resampler'; parts of this model are decoder, image.encoder"),
        (["train.trainable=[decoder,decoder]"], 1, "names 'decoder' 2 times"),
        (["optim.lr=0"], 1, "optim.lr 0.0 must be above 0"),
        (["optim.min_lr=0.1"], 1, "optim.min_lr 0.1 is above optim.lr 0.001"),
        (["optim.min_lr=-0.1"], 1, "optim.min_lr -0.1 must not be negative"),
        (["optim.warmup_fraction=100"], 1, "optim.warmup_fraction 100.0 must be in [0, 1]"),
        (["optim.weight_decay=-1"], 1, "optim.weight_decay -1.0 must not be negative"),
        (["optim.clip_grad=-1"], 1, "optim.clip_grad -1.0 must not be negative"),
        (["optim.beta2=1"], 1, "optim.beta2 1.0 must be in [0, 1)"),
        (["optim.eps=0"], 1, "optim.eps 0.0 must be above 0"),
        (["data.num_workers=-1"], 1, "data.num_workers -1 must not be negative"),
        (["data.packing_buffer_size=0"], 1, "data.packing_buffer_size 0 must be at least 1"),
        (["checkpoint.save_every=0"], 1, "checkpoint.save_every 0 must be at least 1"),
        (["checkpoint.keep=0"], 1, "checkpoint.keep 0 must be at least 1"),
        (
            ["precision=fp8_delayed", "precision.params_dtype=fp32"],
            1,
            "precision.fp8_recipe delayed needs precision.params_dtype bf16, and it is fp32",
        ),
        (["precision=fp8_delayed", "train.seq_length=4100"], 1, "4100 is not divisible by the tile of an FP8"),
        (["precision=fp8_blockwise", "model.ffn_hidden_size=12296"], 1, "FP8: model.ffn_hidden_size"),
    ],
)
def test_a_broken_rule_is_named(overrides, world_size, rule):
    with pytest.raises(ConfigError) as caught:
        check(*overrides, world_size=world_size)
    assert rule in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class ToyEncoderConfig:
    """An encoder of another modality."""

    kind: str = "toy"
    hidden_size: int = 8
    num_attention_heads: int = 2


def test_a_second_modality_has_parts_and_rules_of_its_own(monkeypatch):
    monkeypatch.setitem(ENCODERS, "toy", ToyEncoderConfig)
    overrides = [*REQUIRED, "modality.sound.encoder.kind=toy", "train.trainable=[sound.encoder,sound.projector]"]
    config = compose("stage1_align", overrides)
    assert trainable_parts(config)[-3:] == ["sound.encoder", "sound.resampler", "sound.projector"]
    validate(config, 1)
    with pytest.raises(ConfigError, match=r"modality.sound.encoder.num_attention_heads 2 .* parallel.tp 4"):
        validate(replace(config, parallel=replace(config.parallel, tp=4)), 4)
