"""Deterministic mode: two runs of one command are equal bits; the tool that compares runs says so, and says if not."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_vlm.checkpoint import compare, layout
from tests.train.runs import Run, overrides, train_forked

ROOT = Path(__file__).parents[2]


def run(checkpoint: Path, data: Path, folder: Path, *more: str) -> Run:
    made = Run(folder / "run")
    command = overrides(checkpoint, data, made.exp_dir, "train.deterministic=true", "train.max_steps=2", *more)
    train_forked([*command, "checkpoint.save_every=1"], num_processes=2, folder=folder)
    return made


@pytest.fixture(scope="module")
def runs(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The same command twice, on two data-parallel ranks, and once with another learning rate."""
    return [
        run(checkpoint, data, tmp_path_factory.mktemp("deterministic"), *more) for more in ([], [], ["optim.lr=0.0011"])
    ]


def compare_runs(a: Run, b: Run) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/compare_runs.py", str(a.exp_dir), str(b.exp_dir)]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_the_same_command_gives_equal_bits(runs: list[Run]):
    first, second, _ = (made.exp_dir for made in runs)
    assert compare.first_metric_difference(first, second, 0) is None
    assert runs[0].keys == runs[1].keys
    assert compare.common_steps(first, second) == [1, 2]
    for step in (1, 2):
        states = [layout.step_dir(exp_dir, step) / layout.STATE for exp_dir in (first, second)]
        assert compare.tensor_differences(*states, 0) == []


def test_the_tool_says_so(runs: list[Run]):
    first, second, other = runs
    same = compare_runs(first, second)
    assert same.returncode == 0, same.stderr
    assert "metrics agree" in same.stdout and "saved step 2: all tensors agree" in same.stdout
    apart = compare_runs(first, other)
    assert apart.returncode == 1, apart.stderr
    assert "step 1: lr is" in apart.stdout and "tensors differ" in apart.stdout
