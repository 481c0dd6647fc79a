"""qwen3_vlm: a Megatron-core trainer for Qwen3 vision-language models."""

__version__ = "0.1.0"
