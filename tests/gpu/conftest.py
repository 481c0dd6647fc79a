"""Every test here needs a GPU with TransformerEngine; without one it is skipped."""

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = []
    if not torch.cuda.is_available():
        missing.append("an NVIDIA GPU")
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append("TransformerEngine")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))
