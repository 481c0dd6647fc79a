"""What a modality is: raw media -> a tensor of fixed shape -> (in model/) encoder, resampler, projector -> k tokens.

A modality owns its sentinel in raw text, the tokens that stand for an item in the decoder's sequence, and the
preparation of one raw item. It knows nothing of Megatron. The rest of the code loops over modalities and never asks
which one it has.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from markupsafe import Markup

from qwen3_vlm.config.schema import ModalityConfig


@dataclass(frozen=True, kw_only=True)
class PlaceholderTokens:
    """The tokenizer's own special tokens that stand for one item: start, k x pad, end."""

    start: str
    pad: str
    end: str


class Modality(ABC):
    """One kind of media.

    Args:
        config: this modality's part of the run's configuration.
    """

    name: str
    """Key in configuration, rows and batches: "image"."""
    sentinel: str
    """Marks an item in raw text: "<image>"."""
    placeholder: PlaceholderTokens

    def __init__(self, config: ModalityConfig):
        self.config = config

    @property
    def num_tokens(self) -> int:
        """k: placeholder positions of one item."""
        return self.config.resampler.num_tokens

    @property
    @abstractmethod
    def media_shape(self) -> tuple[int, ...]:
        """Shape of one prepared item."""

    @property
    @abstractmethod
    def media_dtype(self) -> torch.dtype:
        """Dtype of one prepared item as it travels to the device."""

    @abstractmethod
    def preprocess(self, raw: bytes) -> torch.Tensor:
        """Turn the bytes of one media file into a tensor of `media_shape` and `media_dtype`.

        Raises:
            BadSample: the bytes cannot be decoded or break a limit.
        """

    @abstractmethod
    def to_html(self, item: torch.Tensor) -> Markup:
        """Show one prepared item [*media_shape] on a page."""
