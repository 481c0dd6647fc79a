"""tools/benchmark.py convert at a size that shows streaming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    """1.7B with its tower is 4.3 GB; the largest tensor is 0.6 GB. Measured: 0.96 and 1.16 GiB."""
    out = tmp_path / "convert.json"
    command = [sys.executable, "tools/benchmark.py", "convert", "--model", "qwen3_1p7b", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--scratch", str(tmp_path)], cwd=ROOT, env=env, check=True)
    result = json.loads(out.read_text())
    assert result["bit_exact"] and result["tensors_compared"] > 700
    for way in ("import", "export"):
        assert result[way]["peak_rss_gib"] * 2**30 < 0.6 * result["weights_gb"] * 1e9
    assert list(tmp_path.iterdir()) == [out]
