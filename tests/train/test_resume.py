"""A run that is killed, wherever, and started again by the same command is the run that was never killed."""

import signal
from pathlib import Path

import pytest

from tests.train.runs import LR, TWO_EPOCHS, Run, copy_up_to, overrides, train


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_three_times(straight: Run, checkpoint: Path, data: Path, tmp_path: Path):
    """In a step, between writing and completing a save, and between completing and marking it."""
    run = Run(tmp_path / "run")
    command = overrides(checkpoint, data, run.exp_dir, *TWO_EPOCHS)
    assert len(straight.metrics) >= 8

    assert train(command, die_at="step:4").returncode == -signal.SIGKILL
    assert [line["step"] for line in run.metrics] == [1, 2, 3]  # step 3 will be repeated: the save is of step 2

    assert train(command, die_at="save:6").returncode == -signal.SIGKILL
    unfinished = run.step_dir(6)
    assert unfinished.is_dir() and not (unfinished / "qwen3_vlm.json").exists()

    assert train(command, die_at="mark:8").returncode == -signal.SIGKILL
    assert (run.step_dir(8) / "qwen3_vlm.json").exists()
    assert (run.exp_dir / "checkpoints" / "latest").read_text().strip() == "step_00000006"

    done = train(command)
    assert done.returncode == 0, done.describe()
    assert run.metrics == straight.metrics
    assert run.keys == straight.keys


@pytest.mark.full
def test_killed_with_worker_processes(checkpoint: Path, data: Path, tmp_path: Path):
    more = ("train.max_steps=6", "data.num_workers=2")
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    assert train(overrides(checkpoint, data, whole.exp_dir, *more)).returncode == 0
    command = overrides(checkpoint, data, run.exp_dir, *more)
    assert train(command, die_at="step:4").returncode == -signal.SIGKILL
    done = train(command)
    assert done.returncode == 0, done.describe()
    assert run.metrics == whole.metrics
    assert run.keys == whole.keys


def test_running_a_finished_run_again_changes_nothing(straight: Run, checkpoint: Path, data: Path):
    before = snapshot(straight.exp_dir)
    done = train(overrides(checkpoint, data, straight.exp_dir, *TWO_EPOCHS))
    assert done.returncode == 0, done.describe()
    assert "is finished, nothing to do" in done.output
    assert snapshot(straight.exp_dir) == before


def test_every_sample_is_seen_once_an_epoch(straight: Run):
    keys = [key for line in straight.keys for key in line["keys"]]
    expected = sorted(f"s{n}" for n in range(23))
    assert sorted(keys[:23]) == expected  # steps do not reach over the end of an epoch
    assert sorted(keys) == sorted(expected * 2)
    assert sum(line["samples"] for line in straight.metrics) == 23 * 2


def test_the_schedule_ends_at_the_last_sample(straight: Run):
    """A step's rate is that of its middle: the last step's lies half a step from 0 on the cosine."""
    lrs = [line["lr"] for line in straight.metrics]
    peak = max(lrs)
    assert 0.9 * LR < peak <= LR
    assert lrs[lrs.index(peak) :] == sorted(lrs[lrs.index(peak) :], reverse=True)
    assert 0 < lrs[-1] < 0.02 * LR


def test_a_run_goes_on_with_other_settings(straight: Run, checkpoint: Path, data: Path, tmp_path: Path):
    """Begun by steps and at another rate, with other betas: from the resume on it is scheduled as the straight run."""
    run = Run(tmp_path / "run")
    begun = overrides(checkpoint, data, run.exp_dir, "train.max_steps=4", "optim.lr=0.1", "optim.decay=constant")
    assert train(begun).returncode == 0
    assert [line["lr"] for line in run.metrics][1:] == [0.1] * 3
    done = train(overrides(checkpoint, data, run.exp_dir, *TWO_EPOCHS))
    assert done.returncode == 0, done.describe()
    assert run.keys == straight.keys
    assert [line["lr"] for line in run.metrics][4:] == [line["lr"] for line in straight.metrics][4:]


@pytest.mark.full
def test_betas_of_the_configuration_hold_after_a_resume(straight: Run, checkpoint: Path, data: Path, tmp_path: Path):
    run = Run(tmp_path / "run")
    copy_up_to(straight, run, step=4)
    done = train(overrides(checkpoint, data, run.exp_dir, *TWO_EPOCHS, "optim.beta1=0.1", "optim.eps=0.1"))
    assert done.returncode == 0, done.describe()
    losses = [line["loss"] for line in run.metrics]
    expected = [line["loss"] for line in straight.metrics]
    assert losses[:5] == expected[:5] and losses[5] != expected[5]  # step 5's update is the first with the new ones


def test_other_trained_parts_are_refused(straight: Run, checkpoint: Path, data: Path, tmp_path: Path):
    run = Run(tmp_path / "run")
    copy_up_to(straight, run, step=2)
    done = train(overrides(checkpoint, data, run.exp_dir, *TWO_EPOCHS, "train.trainable=[image.projector]"))
    assert done.returncode == 1
    assert "trains ['image.projector', 'image.resampler'], this one trains ['image.projector']" in done.output
    assert "checkpoint.init_from=" in done.output
