"""Exported folders load and answer where only torch, transformers and Pillow are installed.

Makes an environment for each version of transformers (minutes, from the package index). To use ones that exist:

    COMPAT_PYTHONS=/path/to/4.57/bin/python:/path/to/5/bin/python python -m pytest -m full tests/compat
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_vlm.convert.export import Part, export_hf
from tests.cases import PROMPTS, Case, jpeg_file

VERSIONS = ("4.57.*", "5.*")
CASES = ("kv1_tied", "kv8_untied", "n20_learned_layer_2", "n9_pooled_layer_2")
PACKAGES = ("torch", "pillow")
ROOT = Path(__file__).parents[2]


def interpreters(folder: Path) -> list[str]:
    """Pythons of the environments: those of COMPAT_PYTHONS, or fresh ones."""
    if given := os.environ.get("COMPAT_PYTHONS"):
        return given.split(":")
    pythons = []
    for version in VERSIONS:
        home = folder / f"transformers-{version[0]}"
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pythons.append(str(home / "bin" / "python"))
        pins = [p for p in (ROOT / "constraints-cpu.txt").read_text().splitlines() if p.split("==")[0] in PACKAGES]
        packages = [*pins, f"transformers=={version}"]
        subprocess.run([pythons[-1], "-m", "pip", "install", "--quiet", *packages], check=True)
    return pythons


def write_expected(case: Case, out: Path) -> None:
    """The export, and what the reference makes of the prompts."""
    export_hf(checkpoint=case.checkpoint, out=out / "hf", part=Part.all)
    shutil.copyfile(case.folder / "expected.pt", out / "expected.pt")
    reference = case.reference()
    expected = {}
    for name, (turns, seeds) in PROMPTS.items():
        files = [jpeg_file(seed, out) for seed in seeds]
        ids = reference.prompt_ids(turns)
        rest = iter(files)
        messages = []
        for role, content in turns:
            words = content.split("<image>")
            parts: list[dict[str, str]] = [{"type": "text", "text": words[0]}]
            for text in words[1:]:
                parts += [{"type": "image", "path": Path(next(rest)).name}, {"type": "text", "text": text}]
            messages.append({"role": role, "content": parts})
        answer = reference.greedy(ids, files, max_new_tokens=32)
        expected[name] = {"messages": messages, "ids": ids, "answer": answer}
    (out / "expected.json").write_text(json.dumps(expected))


@pytest.mark.full
def test_exports_answer_in_other_versions(cases: dict[str, Case], tmp_path: Path):
    """Largest difference measured: 3.1e-6 with 4.57.6 and with 5.23.0."""
    folders = [tmp_path / name for name in CASES]
    for folder in folders:
        write_expected(cases[folder.name], folder)
    for n, python in enumerate(interpreters(tmp_path)):
        environment = {"HF_HOME": str(tmp_path / f"home{n}"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        for folder in folders:
            shutil.rmtree(folder / "resaved", ignore_errors=True)
        script = Path(__file__).with_name("check_export.py")
        done = subprocess.run([python, script, *folders], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)
