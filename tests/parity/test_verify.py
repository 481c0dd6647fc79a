"""verify: an export passes at every layout; one changed value, a changed file or another model does not."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vlm.convert.export import Part, export_hf
from qwen3_vlm.eval.verify import TOLERANCE, verify
from qwen3_vlm.parallel import topology as topologies
from tests.cases import Case
from tests.distributed.launch import launch

ROOT = Path(__file__).parents[2]
NAMES = ("kv1_tied", "kv8_untied")
TWO = ("parallel=tp2", "parallel=pp2")
FOUR = ("parallel=tp4", "parallel=tp2pp2")
EIGHT = ("parallel=tp4pp2",)


@pytest.fixture(scope="module")
def folder(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CASE/ckpt, CASE/hf, CASE/llm of several cases."""
    folder = tmp_path_factory.mktemp("verify")
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "ckpt").symlink_to(cases[name].checkpoint)
        export_hf(checkpoint=cases[name].checkpoint, out=folder / name / "hf", part=Part.all, max_shard_bytes=200_000)
        export_hf(checkpoint=cases[name].checkpoint, out=folder / name / "llm", part=Part.llm)
    return folder


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    parts = [sys.executable, str(ROOT / "tools/convert.py"), "verify", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(parts, capture_output=True, text=True, env=environment, timeout=240)


def both_parts_pass(folder: Path, parallel: str) -> None:
    """Worst largest difference: 3.1e-6."""
    from megatron.core import parallel_state

    for name in NAMES:
        for part in ("hf", "llm"):
            with mock.patch.object(topologies, "shutdown", parallel_state.destroy_model_parallel):
                found = verify(
                    checkpoint=str(folder / name / "ckpt"),
                    hf=folder / name / part,
                    tolerance=TOLERANCE,
                    overrides=[parallel],
                )
            if found is not None:
                assert found.passed, found.describe()
                assert list(found.logits) == ["text", "one image", "three images"][: 3 if part == "hf" else 1]
                assert min(difference.cosine for difference in found.logits.values()) > 1 - 1e-9


@pytest.mark.parametrize(
    ("num_processes", "layouts"),
    [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.full), pytest.param(8, EIGHT, marks=pytest.mark.full)],
    ids=["two", "four", "eight"],
)
def test_an_export_passes_at_every_layout(folder: Path, tmp_path: Path, num_processes: int, layouts: tuple[str, ...]):
    for name in NAMES:
        (tmp_path / name).symlink_to(folder / name)
    checks = [functools.partial(both_parts_pass, parallel=parallel) for parallel in layouts]
    results = launch(checks, num_processes=num_processes, folder=tmp_path)
    for check in checks:
        results.require(check)


def test_the_command(folder: Path, tmp_path: Path):
    """One process: passes; fails by exit code and by name when one value is changed, or a file."""
    case, findings = folder / "kv8_untied", tmp_path / "found.json"
    done = command("--checkpoint", case / "ckpt", "--hf", case / "hf", "--json", findings)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout and json.loads(findings.read_text())["passed"]

    changed = tmp_path / "hf"
    shutil.copytree(case / "hf", changed)
    shard = sorted(changed.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[7] = torch.nextafter(tensors[name].view(-1)[7], torch.tensor(9.0))
    save_file(tensors, shard, metadata={"format": "pt"})
    (changed / "modeling_qwen3_siglip.py").write_text("raise SystemExit('executed')\n")
    done = command("--checkpoint", case / "ckpt", "--hf", changed, "--json", findings)
    assert done.returncode == 1 and "FAIL" in done.stdout, done.stderr
    found = json.loads(findings.read_text())
    assert found["different_tensors"] == [f"{name}: 1 of {tensors[name].numel()} values"]
    assert found["different_files"] == ["modeling_qwen3_siglip.py"]
    assert max(difference["largest"] for difference in found["logits"].values()) < TOLERANCE  # logits would not tell


def test_another_model_fails(folder: Path, tmp_path: Path):
    """As large, with other weights; and the tolerance is the user's."""
    case, hf = folder / "kv8_untied", tmp_path / "hf"
    shutil.copytree(case / "llm", hf)
    file = hf / "model.safetensors"
    save_file({name: t * 1.01 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    done = command("--checkpoint", case / "ckpt", "--hf", hf, "--tolerance", "100")
    assert done.returncode == 1 and "differ" in done.stdout and "largest difference" in done.stdout
