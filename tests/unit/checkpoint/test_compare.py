"""Two runs side by side: the first difference is named, and equal runs are called equal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from qwen3_vlm.checkpoint import compare, layout
from qwen3_vlm.errors import CheckpointError

STACK = "language_model.decoder.layers.mlp.linear_fc2.weight"
ROOT = Path(__file__).resolve().parents[3]


def write_run(folder: Path, *, losses: list[float], tensors: dict[int, dict[str, torch.Tensor]]) -> Path:
    """An exp_dir with metrics and saved steps."""
    folder.mkdir()
    lines = [{"step": n, "loss": loss, "step_time_s": 1.0 / n} for n, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, state in tensors.items():
        directory = layout.step_dir(folder, step)
        directory.mkdir(parents=True)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory / layout.STATE), no_dist=True)
        (directory / layout.MANIFEST).write_text("{}")
    return folder


def tensors(**changes: Any) -> dict[str, torch.Tensor]:
    state = {STACK: torch.ones(3, 2, 2), "towers.image.resampler.latents": torch.ones(4, 2)}
    return state | changes


def test_equal_runs(tmp_path: Path):
    runs = [write_run(tmp_path / n, losses=[2.0, 1.0], tensors={2: tensors()}) for n in "ab"]
    assert compare.first_metric_difference(*runs, tolerance=0) is None
    assert compare.common_steps(*runs) == [2]
    states = [layout.step_dir(run, 2) / layout.STATE for run in runs]
    assert compare.tensor_differences(*states, tolerance=0) == []


def test_the_first_step_and_the_layer_are_named(tmp_path: Path):
    other = torch.ones(3, 2, 2)
    other[1, 0, 0] += 1e-3
    a = write_run(tmp_path / "a", losses=[2.0, 1.0, 0.5], tensors={2: tensors()})
    b = write_run(tmp_path / "b", losses=[2.0, 1.1, 0.7], tensors={2: tensors(**{STACK: other})})
    found = compare.first_metric_difference(a, b, tolerance=1e-5)
    assert found == compare.MetricDifference(step=2, key="loss", a=1.0, b=1.1)
    assert compare.first_metric_difference(a, b, tolerance=0.5) is None
    states = [layout.step_dir(run, 2) / layout.STATE for run in (a, b)]
    [difference] = compare.tensor_differences(*states, tolerance=0)
    assert difference.name == f"{STACK}[1]"
    assert difference.largest == pytest.approx(1e-3, rel=1e-3)
    assert difference.relative == pytest.approx(5e-4, rel=1e-3)
    assert compare.tensor_differences(*states, tolerance=1e-3) == []


def test_a_missing_tensor_is_a_difference(tmp_path: Path):
    runs = [tmp_path / n for n in "ab"]
    write_run(runs[0], losses=[1.0], tensors={1: tensors(extra=torch.ones(1))})
    write_run(runs[1], losses=[1.0], tensors={1: tensors()})
    states = [layout.step_dir(run, 1) / layout.STATE for run in runs]
    [difference] = compare.tensor_differences(*states, tolerance=1e-5)
    assert (difference.name, difference.relative) == ("extra", float("inf"))


def test_runs_without_a_common_step_are_refused(tmp_path: Path):
    a = write_run(tmp_path / "a", losses=[1.0], tensors={})
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl does not exist"):
        compare.first_metric_difference(a, tmp_path / "nothing", tolerance=0)


def test_command_line(tmp_path: Path):
    a = write_run(tmp_path / "a", losses=[2.0, 1.0], tensors={})
    b = write_run(tmp_path / "b", losses=[2.0, 1.5], tensors={})
    command = [sys.executable, str(ROOT / "tools/compare_runs.py"), str(a)]
    same = subprocess.run([*command, str(a)], capture_output=True, text=True, check=False)
    assert same.returncode == 0 and "metrics agree" in same.stdout
    other = subprocess.run([*command, str(b)], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "step 2: loss is 1.0 and 1.5" in other.stdout
