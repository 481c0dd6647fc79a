"""Every test here needs a GPU with TransformerEngine; without one it is skipped.

None of these tests has ever run: they were written where there is no GPU, and read line by line for where each tensor
lies. What they share with CPU tests (Case, Stepper, isolation, first_step) runs there.
"""

import importlib.util
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = []
    if not torch.cuda.is_available():
        missing.append("an NVIDIA GPU")
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append("TransformerEngine")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))
