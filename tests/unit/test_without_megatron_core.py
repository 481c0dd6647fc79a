"""config/, modality/ and data/ import without Megatron-core; import-linter cannot tell it from megatron.energon."""

import pkgutil
import subprocess
import sys

import pytest

import qwen3_vlm


@pytest.mark.parametrize("room", ["config", "modality", "data"])
def test_a_room_imports_without_megatron_core(room):
    names = [
        module.name
        for module in pkgutil.walk_packages(qwen3_vlm.__path__, "qwen3_vlm.")
        if module.name.startswith(f"qwen3_vlm.{room}.")
    ]
    code = f"import sys, importlib; sys.modules['megatron.core'] = None\nfor n in {names}: importlib.import_module(n)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
