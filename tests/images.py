"""JPEG files of smooth seeded colour patterns: no two alike, and none that a tower could take for blank."""

import io

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (50, 40)) -> bytes:
    """A (width, height) pattern that depends on the seed alone."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
