"""Image decoding: parity with transformers, every mode, and refusals."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from qwen3_vlm.config.schema import ModalityConfig, Resample, SiglipEncoderConfig
from qwen3_vlm.errors import BadSample
from qwen3_vlm.modality import image as image_module
from qwen3_vlm.modality.image import ImageModality

SIZE = 48


def modality(resample: Resample = Resample.bicubic) -> ImageModality:
    encoder = SiglipEncoderConfig(
        image_size=SIZE,
        patch_size=16,
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        resample=resample,
    )
    return ImageModality(ModalityConfig(encoder=encoder))


def photo(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("resample", list(Resample))
@pytest.mark.parametrize("size", [(90, 60), (20, 30), (48, 48), (1, 1), (500, 7)])
def test_pixels_are_transformers(tmp_path, size: tuple[int, int], resample: Resample):
    """Of 255 levels; largest difference measured: 2, in the mean 0.24 (torch resizes here, Pillow there)."""
    raw = encoded(photo(*size), "JPEG")
    (tmp_path / "a.jpg").write_bytes(raw)
    pil_resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[resample.value]
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=pil_resample)
    image = load_image(str(tmp_path / "a.jpg"))
    expected = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    got = modality(resample).preprocess(raw)
    assert got.dtype == torch.uint8 and got.shape == modality().media_shape == (3, SIZE, SIZE)
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= 2 and difference.float().mean() <= 0.3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode: str):
    form = {"CMYK": "JPEG", "YCbCr": "JPEG", "PA": "TIFF"}.get(mode, "PNG")
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    elif mode == "PA":
        image = photo().convert("RGBA").convert("P").convert("RGBA")
        form = "PNG"
    else:
        image = photo().convert(mode)
    assert modality().preprocess(encoded(image, form)).float().std() >= 0


def test_sixteen_bits_are_scaled_and_alpha_is_dropped():
    grey = modality().preprocess(encoded(Image.fromarray(np.full((8, 8), 0x8000, np.uint16))))
    assert (grey == 0x80).all()
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert modality().preprocess(encoded(clear))[:, 0, 0].tolist() == [10, 20, 30]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise: the left half is up
    shown = modality().preprocess(encoded(image, exif=exif))
    assert shown[:, 2].min() > 250 and shown[:, -3].max() < 5


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert modality().preprocess(raw)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("cut", [0, 10, 200, -30])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_truncated_files_are_bad_samples(form: str, cut: int):
    with pytest.raises(BadSample) as error:
        modality().preprocess(encoded(photo(), form)[:cut])
    assert error.value.reason == "corrupt_image"


def test_hostile_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    outcomes = set()
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        for _ in range(40):
            raw = bytearray(encoded(photo(), form))
            for at in rng.integers(0, len(raw), 8):
                raw[at] = rng.integers(256)
            try:
                modality().preprocess(bytes(raw))
                outcomes.add("decoded")
            except BadSample as bad:
                outcomes.add(bad.reason)
    assert outcomes <= {"decoded", "corrupt_image", "image_too_large"} and "corrupt_image" in outcomes


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_bombs_are_refused_before_they_are_decoded(side: int):
    """10,000 is over our limit and below Pillow's; 30,000 over both."""
    with pytest.raises(BadSample) as error:
        modality().preprocess(encoded(Image.new("1", (side, side))))
    assert error.value.reason == "image_too_large"


def test_formats_that_run_programs_are_not_tried():
    with pytest.raises(BadSample, match="bytes starting b'%!PS-Ado' are none of JPEG, PNG"):
        modality().preprocess(encoded(photo(), "EPS"))
    Image.init()
    assert set(image_module.FORMATS) <= set(Image.OPEN)
