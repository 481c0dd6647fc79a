"""The typed schema of a run: one dataclass per conf/ group, each field with its unit and meaning.

YAML holds values, these classes hold types, defaults and meaning. `tree.py` builds them from YAML and refuses what does
not fit; past this room the code sees one frozen `RunConfig` and no DictConfig. A field whose default is MISSING has
to be given by conf/ or the command line.

Dims: s = sequence, h = hidden, n = heads, v = vocabulary, i = media items, k = tokens per item.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """conf/model: a Qwen3 dense decoder, named and sized as its published config.json."""

    name: str = MISSING
    """The published size (qwen3_8b, ...); from_checkpoint: everything below comes from checkpoint.init_from."""
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU's gate and up projections (intermediate_size)."""
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    """Key/value heads (num_key_value_heads)."""
    head_dim: int = MISSING
    vocab_size: int = MISSING
    """Rows of the embedding, as published (larger than the tokenizer); padding for tp is added and removed inside."""
    max_position_embeddings: int = MISSING
    """Longest document in tokens."""
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False


class Resample(Enum):
    """Interpolation of an image to the tower's size."""

    bicubic = "bicubic"
    bilinear = "bilinear"


@dataclass(frozen=True, kw_only=True)
class SiglipEncoderConfig:
    """A SigLIP/SigLIP2 vision tower (fixed resolution), without its pooling head."""

    kind: str = "siglip"
    image_size: int = MISSING
    """Side of the square input in pixels."""
    patch_size: int = MISSING
    """Side of a patch in pixels; the grid has image_size // patch_size a side, and the remainder is cropped, as by a
    'valid' convolution."""
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    layer_norm_eps: float = 1e-6
    feature_layer: int = -1
    """-1: the last layer after post_layernorm; -2: the last but one layer's output as it is (LLaVA's choice)."""
    resample: Resample = Resample.bicubic
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean a channel of pixels in [0, 1], from preprocessor_config.json."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def num_built_layers(self) -> int:
        """Layers that are built: those behind the one whose output is taken are not."""
        return self.num_layers + 1 + self.feature_layer


LATENT_INIT_STD = 0.02
"""Standard deviation of the resampler's learned latents at the start (DESIGN: normal 0.02)."""
ENCODERS: dict[str, type] = {"siglip": SiglipEncoderConfig}
"""Encoder kind -> its dataclass; a new modality adds a line here, in modality/registry.py and in model/tower.py."""


class LatentInit(Enum):
    """How the resampler's queries start."""

    pooled = "pooled"
    learned = "learned"


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Perceiver resampler at the encoder's width: features -> num_tokens latents."""

    num_tokens: int = 64
    """N, the visual tokens an item occupies in the decoder's sequence; 64 (fast), 128 (balanced) or 256 (quality)."""
    depth: int = 3
    """Blocks of cross-attention + FFN."""
    latent_init: LatentInit = LatentInit.pooled
    """pooled: learned latent + features average-pooled to N cells; learned: plain Perceiver."""
    ffn_multiplier: int = 4


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Linear(encoder width -> h), GELU, Linear(h -> h), with biases (LLaVA's mlp2x_gelu)."""

    kind: Literal["mlp2x_gelu"] = "mlp2x_gelu"


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """conf/modality, one entry each: raw media -> encoder -> resampler -> projector -> k placeholder positions."""

    encoder: Any = MISSING
    """One of ENCODERS, chosen by its `kind`."""
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)


class OnError(Enum):
    """What a bad sample does."""

    skip = "skip"
    raise_ = "raise"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """conf/data: what is streamed, packed and in what order."""

    path: str = MISSING
    """A folder that tools/prepare_data.py wrote (holds dataset.yaml), or an energon metadataset YAML."""
    on_error: OnError = OnError.skip
    """skip: count a bad sample by reason and go on; raise: stop at the first and name it."""
    pack: bool = True
    """Pack several samples into a row of train.seq_length; false: one sample a row."""
    num_workers: int = 2
    """Loader processes per data-parallel rank; 0 loads in the training process. May change when a run is resumed."""
    packing_buffer_size: int = 10000
    """Samples, in the order of a pass, that are packed together; more of them fill the rows better."""
    max_items_per_row: int | None = None
    """Most media items in a row of several samples; bounds the encoder's work and memory for a micro batch."""
    bucket_by_items: bool = False
    """Pack samples with similar numbers of media items together (0, 1, 2-3, 4-7, ... a sample)."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """conf/parallel: how the world is cut; dp = world size / (tp * pp * cp)."""

    tp: int = 1
    """Tensor parallel ranks."""
    pp: int = 1
    """Pipeline stages; the encoders stand on the first."""
    vpp: int = 1
    """Virtual stages per pipeline rank (interleaved schedule)."""
    cp: int = 1
    """Context parallel ranks."""
    sequence_parallel: bool = False
    """Split norms and residuals of the decoder along the sequence over the tp ranks."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """conf/precision: the number formats of compute and of the optimizer's state."""

    name: str = "bf16"
    """The option's own name, for logs."""
    params_dtype: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations. Trainable weights have FP32 master copies in the optimizer either way."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] | None = None
    """TransformerEngine's FP8 matrix products in the decoder (GPU only), by how the scales are found; None: no FP8."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in FP32, whatever the weights are kept in."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """conf/optim: AdamW and its schedule, which runs over progress: the share of the run's samples or steps done."""

    lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the run."""
    warmup_fraction: float = 0.03
    """Share of the run over which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """The way from lr to min_lr after the warm-up; constant stays at lr."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """conf/train: how long, how much at a time, and which parts learn."""

    trainable: list[str] = MISSING
    """Parts that train, of decoder and <modality>.{encoder,resampler,projector}: [image.resampler, image.projector]."""
    epochs: float = 1.0
    """Passes over the training split; ignored if max_steps is set."""
    max_steps: int | None = None
    """Optimizer steps in all; replaces epochs."""
    global_batch_size: int = MISSING
    """Packed rows per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = 1
    """Packed rows per forward pass of one data-parallel rank."""
    seq_length: int = MISSING
    """Tokens in a row; a sample that is longer is skipped (reason over_long)."""
    seed: int = 1234
    deterministic: bool = False
    """Ask torch for deterministic kernels: two runs are bit-equal, at some cost on GPUs."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """conf/checkpoint: what a run starts from and how often it is kept."""

    init_from: str | None = None
    """CKPT to start from: the --out of convert.py import, a saved step, or an exp_dir (its latest)."""
    save_every: int = 1000
    """Steps between saves; the last step is always saved."""
    keep: int = 2
    """How many of the newest saves stay on disk; older ones are removed after a new one is complete."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """conf/logging: what a run writes besides metrics.jsonl, which it always writes."""

    tensorboard: bool = True
    """Write <exp_dir>/tensorboard."""
    progress_bar: bool = True
    """Show progress on rank 0's terminal."""
    sample_keys: bool = False
    """Write <exp_dir>/sample_keys.jsonl: the keys of the samples that each step learned from, to audit their order."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run."""

    exp_dir: str = MISSING
    """Run folder: metrics.jsonl, skipped.jsonl, config.yaml, sizes.npz, checkpoints/, tensorboard/. A start resumes."""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    modality: dict[str, ModalityConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
