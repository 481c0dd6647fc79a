"""Image: bytes of an image file -> uint8 pixels [3, size, size] for a SigLIP tower.

Flow: open under a pixel limit -> first frame -> EXIF orientation -> RGB -> resize to the tower's square. Pixels stay
uint8; the model normalises them on its device as (x / 255 - mean) / std.
"""

import base64
import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from PIL import Image, ImageOps, UnidentifiedImageError

from qwen3_vlm.errors import BadSample
from qwen3_vlm.modality.base import Modality, PlaceholderTokens

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own warning limit (256 MiB as RGB)."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Codecs that are tried. Pillow knows more, and one of them (EPS) starts an external program on the file's content."""


class ImageModality(Modality):
    """Still images for a fixed-resolution tower (config.encoder is a `SiglipEncoderConfig`)."""

    name = "image"
    sentinel = "<image>"
    placeholder = PlaceholderTokens(start="<|vision_start|>", pad="<|image_pad|>", end="<|vision_end|>")

    @property
    def media_shape(self) -> tuple[int, ...]:
        """(3, size, size): channel, row, column."""
        size = self.config.encoder.image_size
        return (3, size, size)

    @property
    def media_dtype(self) -> torch.dtype:
        """uint8: a quarter of the bytes of float32 on the way to the device."""
        return torch.uint8

    def preprocess(self, raw: bytes) -> torch.Tensor:
        """Decode and resize one image file.

        torch resizes, with antialias: as torchvision does on tensors, and three times as fast as Pillow on the same
        core. transformers' `SiglipImageProcessorPil` (5.23) gives other pixels in the last digit: on 300 crops of
        photographs, stretched at random, by 9 of 255 levels at most and 0.27 in the mean of an image, most often by 1
        and 0.002. The exported image processor does the same as this.

        Args:
            raw: content of a file in one of `FORMATS`.

        Returns:
            [3, size, size] uint8, RGB.

        Raises:
            BadSample: corrupt_image (unknown format, truncated, broken) or image_too_large (over MAX_PIXELS).
        """
        size = self.config.encoder.image_size
        pixels = torch.from_numpy(np.array(decode_rgb(raw))).permute(2, 0, 1)[None]
        resized = F.interpolate(pixels, (size, size), mode=self.config.encoder.resample.value, antialias=True)
        return resized[0].contiguous()

    def to_html(self, item: torch.Tensor) -> Markup:
        """An <img> with the pixels as the tower sees them, at most 72 px a side."""
        picture = Image.fromarray(item.permute(1, 2, 0).numpy())
        picture.thumbnail((72, 72))
        return png_tag(picture)


def png_tag(image: Image.Image) -> Markup:
    """An <img> that holds its picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img src="data:image/png;base64,{}" width="{}" height="{}">').format(data, image.width, image.height)


def decode_rgb(raw: bytes) -> Image.Image:
    """Decode the first frame of an image file to upright RGB at its own size.

    The same as transformers' `load_image`, which feeds the exported processor: alpha is dropped, not composited, since
    there it is gone before our code could see it. One difference: 16-bit grey is scaled to 8 bits, where Pillow's
    conversion saturates (everything above 255 turns white).

    Raises:
        BadSample: corrupt_image or image_too_large.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns where we refuse; its other warnings (odd EXIF, odd palettes) are about files we can use.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("image_too_large", f"{image.width} x {image.height} pixels, at most {MAX_PIXELS}")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own message holds a memory address: no two runs would log the same
        detail = f"{len(raw)} bytes starting {raw[:8]!r} are none of {', '.join(FORMATS)}"
        raise BadSample("corrupt_image", detail) from error
    except Exception as error:  # codecs raise OSError, SyntaxError, struct.error, IndexError, ... on hostile bytes
        raise BadSample("corrupt_image", f"{type(error).__name__}: {error}") from error
