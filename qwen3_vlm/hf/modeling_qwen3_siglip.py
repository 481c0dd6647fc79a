"""Qwen3 behind a SigLIP tower, a Perceiver resampler and an MLP projector, for transformers 4.57 and 5.x.

Flow: pixels -> tower -> features -> resampler -> N latents -> projector -> embeddings, which replace those of the
`<|image_pad|>` tokens; then the decoder.

Legend: b prompts, s sequence, h decoder width, v vocabulary; i images, p patches, w tower width, k = N latents.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, Qwen3Model, SiglipVisionModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.utils import can_return_tuple

from .configuration_qwen3_siglip import Qwen3SiglipConfig


@dataclass
class Qwen3SiglipModelOutputWithPast(BaseModelOutputWithPast):
    """Hidden states, with what the images became."""

    image_hidden_states: Tensor | None = None
    """[i, k, h]"""


@dataclass
class Qwen3SiglipCausalLMOutputWithPast(ModelOutput):
    """Logits, with what the images became."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, sizes: tuple[int, int, int], *, bias: bool):
        super().__init__()
        self.linear_fc1 = nn.Linear(sizes[0], sizes[1], bias=bias)
        self.linear_fc2 = nn.Linear(sizes[1], sizes[2], bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., sizes[0]] -> [..., sizes[2]]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class ResamplerAttention(nn.Module):
    """Cross-attention without biases; rows of `linear_kv` are a head's keys, then its values, head by head."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.linear_q = nn.Linear(width, width, bias=False)
        self.linear_kv = nn.Linear(width, 2 * width, bias=False)
        self.linear_proj = nn.Linear(width, width, bias=False)

    def forward(self, queries_ikw: Tensor, keys_isw: Tensor) -> Tensor:
        """[i, k, w] attend to [i, s, w] -> [i, k, w]."""
        q = self.linear_q(queries_ikw).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.linear_kv(keys_isw).unflatten(-1, (self.num_heads, 2, -1)).permute(3, 0, 2, 1, 4)
        return self.linear_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ResamplerBlock(GradientCheckpointingLayer):
    """Cross-attention, then FFN; both residual and pre-norm."""

    def __init__(self, config: Qwen3SiglipConfig):
        super().__init__()
        vision = config.vision_config
        width, eps = vision.hidden_size, vision.layer_norm_eps
        self.feature_norm = nn.LayerNorm(width, eps=eps)
        self.latent_norm = nn.LayerNorm(width, eps=eps)
        self.attention = ResamplerAttention(width, vision.num_attention_heads)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = Mlp((width, config.resampler_ffn_multiplier * width, width), bias=False)

    def forward(self, latents_ikw: Tensor, features_ipw: Tensor) -> Tensor:
        """Latents attend to features and to themselves."""
        queries = self.latent_norm(latents_ikw)
        keys = torch.cat([self.feature_norm(features_ipw), queries], dim=1)
        latents_ikw = latents_ikw + self.attention(queries, keys)
        return latents_ikw + self.ffn(self.ffn_norm(latents_ikw))


class Resampler(nn.Module):
    """Features [i, p, w] -> latents [i, k, w]."""

    def __init__(self, config: Qwen3SiglipConfig):
        super().__init__()
        vision = config.vision_config
        self.pooled = config.resampler_latent_init == "pooled"
        self.side = vision.image_size // vision.patch_size
        self.latents = nn.Parameter(torch.empty(config.resampler_num_tokens, vision.hidden_size))
        self.layers = nn.ModuleList(ResamplerBlock(config) for _ in range(config.resampler_depth))
        self.final_norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def forward(self, features_ipw: Tensor) -> Tensor:
        """Resample."""
        latents_ikw = self.latents.expand(features_ipw.shape[0], -1, -1)
        if self.pooled:
            latents_ikw = latents_ikw + self._pool(features_ipw)
        for layer in self.layers:
            latents_ikw = layer(latents_ikw, features_ipw)
        return self.final_norm(latents_ikw)

    def _pool(self, features_ipw: Tensor) -> Tensor:
        """Average the square grid of features over k cells, as square an arrangement as k's divisors allow."""
        cells = self.latents.shape[0]
        rows = max(d for d in range(1, math.isqrt(cells) + 1) if cells % d == 0)
        grid_iwyx = features_ipw.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.adaptive_avg_pool2d(grid_iwyx, (rows, cells // rows)).flatten(2).transpose(1, 2)


class Projector(nn.Module):
    """Latents [i, k, w] -> embeddings [i, k, h]."""

    def __init__(self, config: Qwen3SiglipConfig):
        super().__init__()
        hidden = config.text_config.hidden_size
        self.encoder = Mlp((config.vision_config.hidden_size, hidden, hidden), bias=True)

    def forward(self, latents_ikw: Tensor) -> Tensor:
        """Project."""
        return self.encoder(latents_ikw)


def build_tower(config: Qwen3SiglipConfig) -> Any:
    """SigLIP without pooling head, up to the layer whose output is taken; named the same in transformers 4.57 and 5.x.

    4.57 wraps the tower in a module `vision_model`, 5.x does not.
    """
    tower = SiglipVisionModel(config.vision_config)
    tower = getattr(tower, "vision_model", tower)
    if config.feature_layer != -1:
        tower.encoder.layers = tower.encoder.layers[: config.vision_config.num_hidden_layers + 1 + config.feature_layer]
        tower.post_layernorm = nn.Identity()
    return tower


class Qwen3SiglipPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of the model."""

    config_class = Qwen3SiglipConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3DecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            nn.init.normal_(module.latents, std=0.02)


class Qwen3SiglipModel(Qwen3SiglipPreTrainedModel):
    """Everything but the output layer."""

    def __init__(self, config: Qwen3SiglipConfig):
        super().__init__(config)
        self.vision_tower: Any = build_tower(config)
        self.resampler = Resampler(config)
        self.projector = Projector(config)
        self.language_model = Qwen3Model(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's embedding."""
        self.language_model.embed_tokens = value

    def get_decoder(self) -> nn.Module:
        """The language model."""
        return self.language_model

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [i, 3, H, W], normalised.
            kwargs: for the tower.

        Returns:
            [i, k, h] embeddings.
        """
        pixel_values = pixel_values.to(self.vision_tower.embeddings.patch_embedding.weight.dtype)
        features_ipw = self.vision_tower(pixel_values=pixel_values, **kwargs).last_hidden_state
        return self.projector(self.resampler(features_ipw))

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where image embeddings go.

        Args:
            input_ids: [b, s], or None to recognise the placeholder by its embedding.
            inputs_embeds: [b, s, h].
            image_features: [i, k, h].

        Returns:
            [b, s, h] bool.

        Raises:
            ValueError: there are more or fewer placeholders than embeddings.
        """
        image_token_id = self.config.image_token_id
        if input_ids is None:
            token = torch.full((), image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == image_token_id
        if not torch.compiler.is_compiling() and mask.sum() != image_features.shape[0] * image_features.shape[1]:
            raise ValueError(
                f"the prompts hold {int(mask.sum())} image tokens (id {image_token_id}) but the images make "
                f"{image_features.shape[0]} x {image_features.shape[1]} embeddings: encode text and images together "
                "with the processor, without truncation"
            )
        return mask.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Qwen3SiglipModelOutputWithPast:
        """Embed, place images, decode.

        Args:
            input_ids: [b, s]; or `inputs_embeds` [b, s, h].
            pixel_values: [i, 3, H, W]: the images of all prompts, in the order of their placeholders.
            attention_mask: [b, s], 0 at padding.
            position_ids: [b, s].
            past_key_values: KV cache.
            kwargs: for the decoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return Qwen3SiglipModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class Qwen3SiglipForConditionalGeneration(Qwen3SiglipPreTrainedModel, GenerationMixin):
    """The whole model."""

    # A dict for 5.x; 4.57 reads its keys.
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Qwen3SiglipConfig):
        super().__init__(config)
        self.model = Qwen3SiglipModel(config)
        self.lm_head: nn.Module = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        """The language model."""
        return self.model.language_model

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """[i, 3, H, W] -> [i, k, h]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Qwen3SiglipCausalLMOutputWithPast:
        """Logits [b, s, v], and the loss if there are labels.

        Args:
            labels: [b, s] token ids, -100 where there is no loss; shifted here.
            logits_to_keep: the last so many positions (0: all), or indices of positions.
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds, kwargs: as
                `Qwen3SiglipModel.forward` takes them.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return Qwen3SiglipCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images enter with the prompt; afterwards they are in the cache."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        position = inputs.get("cache_position")  # 4.57 alone; 5.x drops pixel_values itself
        if position is not None and position[0] != 0:
            inputs["pixel_values"] = None
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat a prompt's images as a whole for beams and several answers; rows of pixel_values are no prompts."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            if input_ids is None:
                raise ValueError("several answers a prompt with images need input_ids, not inputs_embeds alone")
            counts = (input_ids == self.config.image_token_id).sum(1) // self.config.resampler_num_tokens
            prompts = pixel_values.split(counts.tolist())
            pixel_values = torch.cat([images for images in prompts for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
