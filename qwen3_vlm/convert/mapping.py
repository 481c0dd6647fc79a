"""The table: checkpoint tensor <-> Hugging Face tensors, with the transform between them.

A checkpoint tensor is named as megatron-core's sharded state dict names it; tensors of a layer stack carry the layer as
their first dimension and appear here once, with `{i}` in the Hugging Face names. The names are those of
TransformerEngine's fused layers, which megatron-core's local layers map themselves to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig, SiglipEncoderConfig
from qwen3_vlm.convert import transforms
from qwen3_vlm.convert.connector import connector_shapes

LANGUAGE_MODEL = "language_model."
EXPORTED_DECODER, EXPORTED_TOWER = "model.language_model.", "model.vision_tower."
EXPORTED_CONNECTOR = ("model.resampler.", "model.projector.")
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint tensor and the Hugging Face tensors it is made of."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    """Of ours, one layer's."""
    num_layers: int | None = None
    """Length of the layer stack; None for a tensor outside it."""
    padded: bool = False
    """A run's checkpoint may hold more rows than `shape` says: the vocabulary is padded to a multiple of tp."""
    to_ours: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]
    to_theirs: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)

    def their_names(self, layer: int | None) -> tuple[str, ...]:
        """Hugging Face names for one layer."""
        return self.theirs if layer is None else tuple(name.format(i=layer) for name in self.theirs)

    def layers(self) -> Sequence[int | None]:
        """Layers to visit; [None] outside a stack."""
        return [None] if self.num_layers is None else range(self.num_layers)


def decoder_entries(decoder: DecoderConfig) -> list[Entry]:
    """Qwen3ForCausalLM (transformers 5.23 modeling_qwen3.py)."""
    h, d, f = decoder.hidden_size, decoder.head_dim, decoder.ffn_hidden_size
    n, g = decoder.num_attention_heads, decoder.num_query_groups
    stack, layer, hf = f"{LANGUAGE_MODEL}decoder.layers.", decoder.num_layers, "model.layers.{i}."
    entries = [
        Entry(
            ours=f"{LANGUAGE_MODEL}embedding.word_embeddings.weight",
            theirs=("model.embed_tokens.weight",),
            shape=(decoder.vocab_size, h),
            padded=True,
        ),
        Entry(
            ours=f"{stack}self_attention.linear_qkv.layer_norm_weight",
            theirs=(f"{hf}input_layernorm.weight",),
            shape=(h,),
            num_layers=layer,
        ),
        Entry(
            ours=f"{stack}self_attention.linear_qkv.weight",
            theirs=tuple(f"{hf}self_attn.{x}_proj.weight" for x in "qkv"),
            shape=((n + 2 * g) * d, h),
            num_layers=layer,
            to_ours=lambda qkv: transforms.fuse_qkv(*qkv, num_groups=g),
            to_theirs=lambda qkv: transforms.split_qkv(qkv, num_groups=g, head_dim=d),
        ),
        *(
            Entry(
                ours=f"{stack}self_attention.{x}_layernorm.weight",
                theirs=(f"{hf}self_attn.{x}_norm.weight",),
                shape=(d,),
                num_layers=layer,
            )
            for x in "qk"
        ),
        Entry(
            ours=f"{stack}self_attention.linear_proj.weight",
            theirs=(f"{hf}self_attn.o_proj.weight",),
            shape=(h, n * d),
            num_layers=layer,
        ),
        Entry(
            ours=f"{stack}mlp.linear_fc1.layer_norm_weight",
            theirs=(f"{hf}post_attention_layernorm.weight",),
            shape=(h,),
            num_layers=layer,
        ),
        Entry(
            ours=f"{stack}mlp.linear_fc1.weight",
            theirs=(f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            shape=(2 * f, h),
            num_layers=layer,
            to_ours=lambda gate_up: transforms.fuse_gate_up(*gate_up),
            to_theirs=transforms.split_gate_up,
        ),
        Entry(
            ours=f"{stack}mlp.linear_fc2.weight",
            theirs=(f"{hf}mlp.down_proj.weight",),
            shape=(h, f),
            num_layers=layer,
        ),
        Entry(ours=f"{LANGUAGE_MODEL}decoder.final_layernorm.weight", theirs=("model.norm.weight",), shape=(h,)),
    ]
    if not decoder.tie_word_embeddings:
        entries.append(
            Entry(
                ours=f"{LANGUAGE_MODEL}output_layer.weight",
                theirs=(LM_HEAD,),
                shape=(decoder.vocab_size, h),
                padded=True,
            )
        )
    return entries


def siglip_unbuilt(encoder: SiglipEncoderConfig) -> tuple[str, ...]:
    """Prefixes of Hugging Face tensors behind the layer whose output is taken: they are never computed."""
    layers = tuple(f"encoder.layers.{i}." for i in range(encoder.num_built_layers, encoder.num_layers))
    return layers if encoder.feature_layer == -1 else (*layers, "post_layernorm.")


def siglip_entries(encoder: SiglipEncoderConfig, tower: str) -> list[Entry]:
    """SiglipVisionModel without its `vision_model.` prefix (transformers 5.23 modeling_siglip.py).

    Args:
        encoder: sizes.
        tower: prefix of the tower in the checkpoint, e.g. "towers.image.".
    """
    w, f, n = encoder.hidden_size, encoder.ffn_hidden_size, encoder.num_attention_heads
    patches = (encoder.image_size // encoder.patch_size) ** 2
    prefix = f"{tower}encoder."
    stack, hf = f"{prefix}block.layers.", "encoder.layers.{i}."
    built = encoder.num_built_layers
    entries = [
        Entry(
            ours=f"{prefix}patch_embedding.weight",
            theirs=("embeddings.patch_embedding.weight",),
            shape=(w, 3, encoder.patch_size, encoder.patch_size),
        ),
        Entry(ours=f"{prefix}patch_embedding.bias", theirs=("embeddings.patch_embedding.bias",), shape=(w,)),
        Entry(ours=f"{prefix}position_embedding", theirs=("embeddings.position_embedding.weight",), shape=(patches, w)),
    ]

    def layered(ours: str, theirs: str, shape: tuple[int, ...]) -> Entry:
        return Entry(ours=f"{stack}{ours}", theirs=(f"{hf}{theirs}",), shape=shape, num_layers=built)

    for kind, columns in (("weight", (w,)), ("bias", ())):
        entries += [
            Entry(
                ours=f"{stack}self_attention.linear_qkv.{kind}",
                theirs=tuple(f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv"),
                shape=(3 * w, *columns),
                num_layers=built,
                to_ours=lambda qkv: transforms.fuse_qkv(*qkv, num_groups=n),
                to_theirs=lambda qkv: transforms.split_qkv(qkv, num_groups=n, head_dim=w // n),
            ),
            layered(f"self_attention.linear_qkv.layer_norm_{kind}", f"layer_norm1.{kind}", (w,)),
            layered(f"self_attention.linear_proj.{kind}", f"self_attn.out_proj.{kind}", (w, *columns)),
            layered(f"mlp.linear_fc1.layer_norm_{kind}", f"layer_norm2.{kind}", (w,)),
            layered(f"mlp.linear_fc1.{kind}", f"mlp.fc1.{kind}", (f, *columns)),
            layered(f"mlp.linear_fc2.{kind}", f"mlp.fc2.{kind}", (w, f) if kind == "weight" else (w,)),
        ]
        if encoder.feature_layer == -1:
            entries.append(
                Entry(ours=f"{prefix}block.final_layernorm.{kind}", theirs=(f"post_layernorm.{kind}",), shape=(w,))
            )
    return entries


def exported_decoder_entries(decoder: DecoderConfig) -> list[Entry]:
    """The decoder in our own exports: `model.X` becomes `model.language_model.X`."""
    return _renamed(
        decoder_entries(decoder), lambda n: n if n == LM_HEAD else EXPORTED_DECODER + n.removeprefix("model.")
    )


def exported_tower_entries(encoder: SiglipEncoderConfig, tower: str) -> list[Entry]:
    """The vision tower in our own exports."""
    return _renamed(siglip_entries(encoder, tower), lambda n: EXPORTED_TOWER + n)


def exported_connector_entries(modality: ModalityConfig, decoder: DecoderConfig, tower: str) -> list[Entry]:
    """Resampler and projector in our own exports: names and values as they are."""
    return [
        Entry(ours=name, theirs=(f"model.{name.removeprefix(tower)}",), shape=shape)
        for name, shape in connector_shapes(modality, decoder, tower).items()
    ]


def _renamed(entries: list[Entry], rename: Callable[[str], str]) -> list[Entry]:
    return [replace(entry, theirs=tuple(map(rename, entry.theirs))) for entry in entries]
