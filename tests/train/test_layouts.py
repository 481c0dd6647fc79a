"""One run at several layouts: tensor and pipeline ranks change nothing, data-parallel ranks share the samples out."""

import os
from pathlib import Path
from unittest import mock

import pytest

from qwen3_vlm.parallel import topology as topologies
from tests.distributed.launch import Check, Results, launch
from tests.train.runs import TWO_EPOCHS, Run, overrides, prepared, row, train


def _train_in_ranks(folder: Path, parallel: str) -> None:
    """The straight run's command at another layout, in processes that train at a next one afterwards."""
    from megatron.core import parallel_state

    from qwen3_vlm.checkpoint.layout import read_architecture
    from qwen3_vlm.config.compose import compose
    from qwen3_vlm.config.validate import validate
    from qwen3_vlm.train.__main__ import train as train_in_process

    checkpoint, data = ((folder / name).resolve() for name in ("checkpoint", "data"))
    command = overrides(checkpoint, data, folder / parallel, *TWO_EPOCHS, f"parallel={parallel}")
    config = compose("stage1_align", command, read_architecture=read_architecture)
    validate(config, int(os.environ["WORLD_SIZE"]))
    with mock.patch.object(topologies, "shutdown", parallel_state.destroy_model_parallel):
        train_in_process(config)


def tp2(folder: Path) -> None:
    """Tensor and sequence parallel."""
    _train_in_ranks(folder, "tp2")


def pp2(folder: Path) -> None:
    """Two stages."""
    _train_in_ranks(folder, "pp2")


LAYOUTS = (tp2, pp2)


@pytest.fixture(scope="module")
def results(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """One start of two processes that trains at both layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "checkpoint").symlink_to(checkpoint)
    (folder / "data").symlink_to(data)
    return folder, launch(LAYOUTS, num_processes=2, folder=folder)


@pytest.mark.parametrize("check", LAYOUTS, ids=lambda check: check.__name__)
def test_losses_and_gradient_norms_are_those_of_one_process(results: tuple[Path, Results], straight: Run, check: Check):
    """Worst relative difference: tp2 loss 1e-7, gradient norm 2.3e-6; pp2 none."""
    folder, outcome = results
    outcome.require(check)
    run = Run(folder / check.__name__)
    assert run.keys == straight.keys
    floats = ("loss", "grad_norm")
    for got, expected in zip(run.metrics, straight.metrics, strict=True):
        for name in floats:
            assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=0), (got["step"], name)
        assert {k: v for k, v in got.items() if k not in floats} == {
            k: v for k, v in expected.items() if k not in floats
        }


def test_data_parallel_ranks_see_every_sample_once_an_epoch(checkpoint: Path, tmp_path: Path):
    """An odd number of rows, ranks with and without images in a step, steps without any image: no hang, none lost."""
    count = 11
    images = [2 if n == 4 else int(n in (1, 9)) for n in range(count)]
    data = prepared(tmp_path / "data", [row(n, images=i) for n, i in enumerate(images)])
    run = Run(tmp_path / "run")
    more = ("train.epochs=2", "train.seq_length=128", "data.pack=false", "data.num_workers=1")
    done = train(overrides(checkpoint, data, run.exp_dir, *more), num_processes=2)
    assert done.returncode == 0, done.describe()
    keys = [key for line in run.keys for key in line["keys"]]
    assert sorted(keys) == sorted(f"s{n}" for n in range(count) for _ in range(2))
    assert sorted(set(keys[:count])) == sorted(f"s{n}" for n in range(count))
    per_step = [line["images"] for line in run.metrics]
    assert 0 in per_step and 1 in per_step  # nobody has an image; one rank has one and the other none
    assert [line["samples"] for line in run.metrics] == [2, 2, 2, 2, 2, 1] * 2  # one rank ends a row before the other
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in run.metrics)
    lrs = [line["lr"] for line in run.metrics]
    assert 0 < lrs[-1] < 0.02 * max(lrs)
