"""An installed wheel holds conf/ and the files of an exported folder, and composes from any directory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.full
def test_a_wheel_composes_from_any_directory(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = tmp_path / "source"  # a copy: building leaves a build/ folder, which would go into the next wheel
    for folder in ("qwen3_vlm", "conf"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / file, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    code = (
        "from qwen3_vlm.config.compose import compose, conf_dir\n"
        "assert compose('stage1_align', ['exp_dir=x', 'data.path=y']).model.num_layers == 36\n"
        "from qwen3_vlm.hf import folder\n"
        "names = (*folder.CODE, folder.CHAT_TEMPLATE, folder.MODEL_CARD)\n"
        "assert all((folder.HERE / name).is_file() for name in names)\n"
        "print(conf_dir())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "qwen3_vlm" / "conf"
