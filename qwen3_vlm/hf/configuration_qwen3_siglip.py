"""Configuration of a Qwen3 decoder behind a SigLIP tower, a Perceiver resampler and an MLP projector."""

from typing import Any

from transformers import PretrainedConfig, Qwen3Config, SiglipVisionConfig


class Qwen3SiglipConfig(PretrainedConfig):
    """Sizes of all parts.

    Args:
        text_config: the decoder, as `Qwen3Config`.
        vision_config: the tower, as `SiglipVisionConfig`, with the number of layers that it was published with.
        feature_layer: -1: the tower's last layer after post_layernorm; -2: the last but one layer's plain output.
            Layers behind it are not built.
        resampler_num_tokens: N, the visual tokens of an image.
        resampler_depth: blocks of cross-attention and FFN.
        resampler_latent_init: "pooled" (learned latents + average-pooled features) or "learned".
        resampler_ffn_multiplier: width of the FFN in tower widths.
        image_token_id, vision_start_token_id, vision_end_token_id: `<|image_pad|>` and the tokens around N of them.
        tie_word_embeddings: whether the output layer is the embedding.
    """

    model_type = "qwen3_siglip_vlm"
    sub_configs = {"text_config": Qwen3Config, "vision_config": SiglipVisionConfig}  # noqa: RUF012 (transformers' form)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | Qwen3Config | None = None,
        vision_config: dict[str, Any] | SiglipVisionConfig | None = None,
        feature_layer: int = -1,
        resampler_num_tokens: int = 64,
        resampler_depth: int = 3,
        resampler_latent_init: str = "pooled",
        resampler_ffn_multiplier: int = 4,
        image_token_id: int = 151655,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        if text_config is None:
            text_config = {"tie_word_embeddings": tie_word_embeddings}
        if vision_config is None:
            vision_config = {"vision_use_head": False}
        self.text_config = Qwen3Config(**text_config) if isinstance(text_config, dict) else text_config
        self.vision_config = SiglipVisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        if self.text_config.tie_word_embeddings != tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings is {tie_word_embeddings} in the configuration and "
                f"{self.text_config.tie_word_embeddings} in its text_config: they must be equal"
            )
        if resampler_latent_init not in ("pooled", "learned"):
            raise ValueError(f"resampler_latent_init is {resampler_latent_init!r}, expected 'pooled' or 'learned'")
        self.feature_layer = feature_layer
        self.resampler_num_tokens = resampler_num_tokens
        self.resampler_depth = resampler_depth
        self.resampler_latent_init = resampler_latent_init
        self.resampler_ffn_multiplier = resampler_ffn_multiplier
        self.image_token_id = image_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
