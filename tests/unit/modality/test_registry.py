"""The registry: building, and its refusals."""

import pytest

from qwen3_vlm.config.schema import ModalityConfig, ResamplerConfig, SiglipEncoderConfig
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.modality.image import ImageModality
from qwen3_vlm.modality.registry import MODALITIES, build_modalities

CONFIG = ModalityConfig(encoder=SiglipEncoderConfig(image_size=16), resampler=ResamplerConfig(num_tokens=9))


def test_builds_by_name():
    (name, modality), *rest = build_modalities({"image": CONFIG}).items()
    assert name == modality.name == "image" and not rest
    assert isinstance(modality, ImageModality) and modality.num_tokens == 9


def test_unknown_modality_is_refused():
    with pytest.raises(ConfigError, match="unknown modality sound: this code has image"):
        build_modalities({"image": CONFIG, "sound": CONFIG})


def test_shared_sentinel_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODALITIES, "copy", ImageModality)
    with pytest.raises(ConfigError, match="modalities image and copy share the sentinel <image>"):
        build_modalities({"image": CONFIG, "copy": CONFIG})
