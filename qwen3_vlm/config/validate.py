"""Rules that a run has to keep, checked before any model is built. Each refusal names the keys and shows the numbers.

Types and names are the schema's business (tree.py); what needs a device or a file is checked where it is used.
"""

from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, ParallelConfig, RunConfig, SiglipEncoderConfig
from qwen3_vlm.errors import ConfigError

FP8_ALIGNMENT = 16
"""TransformerEngine's FP8 matrix products need rows and columns in multiples of this."""


def validate(config: RunConfig, world_size: int) -> None:
    """Check a run's configuration against the number of processes that will run it.

    Args:
        config: the run.
        world_size: processes of the job.

    Raises:
        ConfigError: the first rule that is broken, with its numbers.
    """
    _check_ranges(config)
    _check_parallel(config.parallel, world_size)
    _check_decoder(config.model, config.parallel)
    for name, modality in config.modality.items():
        check_modality(f"modality.{name}", modality, config.parallel, config.train.seq_length)
    _check_batch(config, world_size)
    _check_trainable(config)
    if config.precision.fp8_recipe is not None:
        _check_fp8(config)


def trainable_parts(config: RunConfig) -> list[str]:
    """Name the parts that train.trainable may hold: decoder, and encoder, resampler and projector of each modality."""
    return [
        "decoder",
        *(f"{name}.{part}" for name in config.modality for part in ("encoder", "resampler", "projector")),
    ]


def _check_ranges(config: RunConfig) -> None:
    """Rules about one number, or two of one group."""
    parallel, train, optim, data = config.parallel, config.train, config.optim, config.data
    at_least_one = {
        "parallel.tp": parallel.tp,
        "parallel.pp": parallel.pp,
        "parallel.vpp": parallel.vpp,
        "parallel.cp": parallel.cp,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.seq_length": train.seq_length,
        "train.max_steps": 1 if train.max_steps is None else train.max_steps,
        "data.packing_buffer_size": data.packing_buffer_size,
        "data.max_items_per_row": 1 if data.max_items_per_row is None else data.max_items_per_row,
        "checkpoint.save_every": config.checkpoint.save_every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for key, count in at_least_one.items():
        _require(count >= 1, f"{key} {count} must be at least 1")
    not_negative: dict[str, float] = {
        "data.num_workers": data.num_workers,
        "train.seed": train.seed,
        "optim.min_lr": optim.min_lr,
        "optim.weight_decay": optim.weight_decay,
        "optim.clip_grad": optim.clip_grad,
    }
    for key, value in not_negative.items():
        _require(value >= 0, f"{key} {value} must not be negative")
    for key, value in {"train.epochs": train.epochs, "optim.lr": optim.lr, "optim.eps": optim.eps}.items():
        _require(value > 0, f"{key} {value} must be above 0")
    for key, value in {"optim.beta1": optim.beta1, "optim.beta2": optim.beta2}.items():
        _require(0 <= value < 1, f"{key} {value} must be in [0, 1)")
    warmup = optim.warmup_fraction
    _require(0 <= warmup <= 1, f"optim.warmup_fraction {warmup} must be in [0, 1]: it is a share of the run, not steps")
    _require(optim.min_lr <= optim.lr, f"optim.min_lr {optim.min_lr} is above optim.lr {optim.lr}")


def _check_parallel(parallel: ParallelConfig, world_size: int) -> None:
    tp, pp, cp = parallel.tp, parallel.pp, parallel.cp
    _require(cp == 1, f"parallel.cp {cp}: context parallelism is not implemented yet; use 1")
    _require(parallel.vpp == 1, f"parallel.vpp {parallel.vpp}: the interleaved schedule is not implemented yet; use 1")
    _require(
        world_size % (tp * pp * cp) == 0,
        f"the job's {world_size} processes are not divisible by parallel.tp * pp * cp = {tp} * {pp} * {cp} "
        f"= {tp * pp * cp}",
    )
    _require(tp > 1 or not parallel.sequence_parallel, "parallel.sequence_parallel needs parallel.tp > 1, and tp is 1")


def _check_decoder(model: DecoderConfig, parallel: ParallelConfig) -> None:
    tp, groups = parallel.tp, model.num_query_groups
    _require_divisible("model.num_attention_heads", model.num_attention_heads, "model.num_query_groups", groups)
    _require_divisible("model.num_attention_heads", model.num_attention_heads, "parallel.tp", tp)
    _require(  # with more ranks than groups, megatron-core gives several ranks the same key/value head
        groups % tp == 0 or tp % groups == 0,
        f"model.num_query_groups {groups} and parallel.tp {tp}: neither is divisible by the other",
    )
    _require_divisible("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tp", tp)
    _require_divisible("model.hidden_size", model.hidden_size, "parallel.tp", tp)
    _require_divisible("model.num_layers", model.num_layers, "parallel.pp", parallel.pp)


def check_modality(path: str, modality: ModalityConfig, parallel: ParallelConfig, seq_length: int) -> None:
    """Check what a modality computes with, at a layout.

    Args:
        path: where it stands, for messages: `modality.image`.
        modality: its configuration.
        parallel: how it is cut.
        seq_length: tokens of a row, which an item must fit.

    Raises:
        ConfigError: the first rule that is broken, with its numbers.
    """
    encoder, resampler, tp = modality.encoder, modality.resampler, parallel.tp
    heads = encoder.num_attention_heads
    for name in ("num_tokens", "depth", "ffn_multiplier"):
        value = getattr(resampler, name)
        _require(value >= 1, f"{path}.resampler.{name} {value} must be at least 1")
    _require(
        resampler.num_tokens + 2 <= seq_length,
        f"{path}.resampler.num_tokens {resampler.num_tokens} and an item's start and end token do not fit a row of "
        f"train.seq_length {seq_length}",
    )
    _require_divisible(f"{path}.encoder.hidden_size", encoder.hidden_size, "its num_attention_heads", heads)
    _require_divisible(f"{path}.encoder.num_attention_heads", heads, "parallel.tp", tp)
    width = resampler.ffn_multiplier * encoder.hidden_size
    _require_divisible(f"{path}.resampler's FFN, ffn_multiplier * encoder.hidden_size =", width, "parallel.tp", tp)
    if isinstance(encoder, SiglipEncoderConfig):
        _check_siglip(f"{path}.encoder", encoder, tp)


def _check_siglip(path: str, encoder: SiglipEncoderConfig, tp: int) -> None:
    _require_divisible(f"{path}.ffn_hidden_size", encoder.ffn_hidden_size, "parallel.tp", tp)
    _require(
        1 <= encoder.patch_size <= encoder.image_size,
        f"{path}.patch_size {encoder.patch_size} must be from 1 to image_size {encoder.image_size}",
    )
    layers, feature = encoder.num_layers, encoder.feature_layer
    _require(-layers <= feature <= -1, f"{path}.feature_layer {feature} must be from -{layers} (num_layers) to -1")


def _check_batch(config: RunConfig, world_size: int) -> None:
    train, parallel = config.train, config.parallel
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    micro, rows = train.micro_batch_size, train.global_batch_size
    _require(
        rows % (micro * dp) == 0,
        f"train.global_batch_size {rows} is not divisible by train.micro_batch_size {micro} * {dp} data-parallel ranks "
        f"= {micro * dp}",
    )
    longest = config.model.max_position_embeddings
    _require(
        train.seq_length <= longest,
        f"train.seq_length {train.seq_length} is above model.max_position_embeddings {longest}",
    )
    if parallel.sequence_parallel:
        _require_divisible(
            "train.seq_length * train.micro_batch_size =", train.seq_length * micro, "parallel.tp", parallel.tp
        )


def _check_trainable(config: RunConfig) -> None:
    trainable, parts = config.train.trainable, trainable_parts(config)
    _require(bool(trainable), f"train.trainable is empty: nothing would learn; choose from {', '.join(parts)}")
    for part in trainable:
        _require(part in parts, f"train.trainable names {part!r}; parts of this model are {', '.join(parts)}")
        _require(trainable.count(part) == 1, f"train.trainable names {part!r} {trainable.count(part)} times")


def _check_fp8(config: RunConfig) -> None:
    model, tp = config.model, config.parallel.tp
    _require(
        config.precision.params_dtype == "bf16",
        f"precision.fp8_recipe {config.precision.fp8_recipe} needs precision.params_dtype bf16, "
        f"and it is {config.precision.params_dtype}",
    )
    split = tp if config.parallel.sequence_parallel else 1
    sizes = {
        "train.seq_length * train.micro_batch_size / ranks that split the sequence": (
            config.train.seq_length * config.train.micro_batch_size // split
        ),
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / parallel.tp": model.ffn_hidden_size // tp,
        "model.num_attention_heads * head_dim / parallel.tp": model.num_attention_heads * model.head_dim // tp,
    }
    for key, value in sizes.items():
        _require_divisible(f"FP8: {key} =", value, "the tile of an FP8 matrix product,", FP8_ALIGNMENT)


def _require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    _require(value % by == 0, f"{name} {value} is not divisible by {by_name} {by}")


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(rule)
