"""One run at several layouts, and a run that goes on at another layout than it was saved at: the same numbers."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from qwen3_vlm.parallel import topology as topologies
from tests.distributed.launch import Check, Results, launch
from tests.train.runs import EVERYTHING, TWO_EPOCHS, Run, copy_up_to, overrides, prepared, row, train

SAVED_AT = 4
LAYOUTS = {
    "tp2": ("parallel=tp2",),
    "tp2_whole_sequence": ("parallel=tp2", "parallel.sequence_parallel=false"),
    "pp2": ("parallel=pp2",),
    "dp2": ("train.micro_batch_size=1",),
    "tp4": ("parallel=tp4",),
    "pp4": ("parallel=pp4",),
    "tp2_pp2": ("parallel=tp2pp2",),
    "tp2_dp2": ("parallel=tp2",),
    "pp2_dp2": ("parallel=pp2",),
    "dp4": (),
}
"""What the command line adds; dp follows from the number of processes."""
MOVES = [("one", "tp2"), ("tp2", "pp2"), ("pp2", "dp2"), ("dp2", "tp2_whole_sequence")]
"""Layout of the save -> layout that goes on; two processes."""
MOVES_TO_ONE = ["dp2", "tp2", "pp2"]
FULL_MOVES = [("one", "dp4"), ("dp4", "tp2_pp2"), ("tp2_pp2", "pp4"), ("pp4", "tp4"), ("tp4", "pp2_dp2")]
FULL_MOVES += [("pp2_dp2", "tp2_dp2"), ("tp2_dp2", "dp4")]
"""Four processes."""


def command(folder: Path, name: str, layout: str) -> list[str]:
    """One run in which every part learns; the steps are of 4 rows."""
    inputs = [(folder / link).resolve() for link in ("checkpoint", "data")]
    more = (*TWO_EPOCHS, EVERYTHING, "train.global_batch_size=4", *LAYOUTS.get(layout, ()))
    return overrides(*inputs, folder / name, *more)


def train_here(folder: Path, name: str, layout: str) -> None:
    """The command, in processes that train at a next layout afterwards."""
    from megatron.core import parallel_state

    from qwen3_vlm.checkpoint.layout import read_architecture
    from qwen3_vlm.config.compose import compose
    from qwen3_vlm.config.validate import validate
    from qwen3_vlm.train.__main__ import train as train_in_process

    config = compose("stage1_align", command(folder, name, layout), read_architecture=read_architecture)
    validate(config, int(os.environ["WORLD_SIZE"]))
    with mock.patch.object(topologies, "shutdown", parallel_state.destroy_model_parallel):
        train_in_process(config)


def move(folder: Path, source: str, target: str) -> None:
    """Save at one layout, go on at another."""
    if os.environ["RANK"] == "0":
        copy_up_to(Run(folder / source), Run(folder / f"{source}_to_{target}"), step=SAVED_AT)
    dist.barrier()
    train_here(folder, f"{source}_to_{target}", target)


def _run_all(folder: Path, moves: list[tuple[str, str]]) -> None:
    for layout in dict.fromkeys(layout for pair in moves for layout in pair if layout != "one"):
        train_here(folder, layout, layout)
    for source, target in moves:
        move(folder, source, target)


def two(folder: Path) -> None:
    """Every layout of two processes, and the moves between them."""
    _run_all(folder, MOVES)


def four(folder: Path) -> None:
    """Every layout of four processes, and the moves between them."""
    _run_all(folder, FULL_MOVES)


@pytest.fixture(scope="module")
def start(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Check, int], Path]:
    """A start of several processes in a folder that already holds the run of one process."""
    whole = tmp_path_factory.mktemp("layouts")
    (whole / "checkpoint").symlink_to(checkpoint)
    (whole / "data").symlink_to(data)
    done = train(command(whole, "one", "one"))
    assert done.returncode == 0, done.describe()

    def launch_in(check: Check, num_processes: int) -> Path:
        folder = whole.parent / f"{whole.name}_{num_processes}"
        shutil.copytree(whole, folder, symlinks=True)
        results: Results = launch([check], num_processes=num_processes, folder=folder, timeout_s=600)
        results.require(check)
        return folder

    return launch_in


@pytest.fixture(scope="module")
def of_two(start: Callable[[Check, int], Path]) -> Path:
    """Runs of two processes."""
    return start(two, 2)


@pytest.fixture(scope="module")
def of_four(start: Callable[[Check, int], Path]) -> Path:
    """Runs of four processes."""
    return start(four, 4)


def assert_same_run(folder: Path, name: str) -> None:
    """Every step of the run of one process: the same samples, losses and gradient norms."""
    run, one = Run(folder / name), Run(folder / "one")
    assert [sorted(line["keys"]) for line in run.keys] == [sorted(line["keys"]) for line in one.keys]
    floats = ("loss", "grad_norm")
    for got, expected in zip(run.metrics, one.metrics, strict=True):
        for key in floats:
            assert got[key] == pytest.approx(expected[key], rel=1e-5, abs=0), (got["step"], key)
        assert {k: v for k, v in got.items() if k not in floats} == {
            k: v for k, v in expected.items() if k not in floats
        }


@pytest.mark.parametrize("layout", dict.fromkeys(layout for pair in MOVES for layout in pair))
def test_losses_and_gradient_norms_are_those_of_one_process(of_two: Path, layout: str):
    """Worst relative difference: loss 8.3e-7, gradient norm 2.2e-6 (tp2); without tp 7e-8, 1.4e-7."""
    assert len(Run(of_two / layout).metrics) > SAVED_AT + 1
    assert_same_run(of_two, layout)


@pytest.mark.parametrize("pair", MOVES, ids="_to_".join)
def test_a_run_goes_on_at_another_layout(of_two: Path, pair: tuple[str, str]):
    """Worst relative difference: loss 8.3e-7, gradient norm 2.2e-6 (from tp2, before the move)."""
    assert_same_run(of_two, "_to_".join(pair))


@pytest.mark.parametrize(
    "layout", [*MOVES_TO_ONE[:1], *(pytest.param(name, marks=pytest.mark.full) for name in MOVES_TO_ONE[1:])]
)
def test_a_run_goes_on_in_one_process(of_two: Path, layout: str):
    name = f"{layout}_to_one"
    copy_up_to(Run(of_two / layout), Run(of_two / name), step=SAVED_AT)
    done = train(command(of_two, name, "one"))
    assert done.returncode == 0, done.describe()
    assert_same_run(of_two, name)


@pytest.mark.full
@pytest.mark.parametrize("layout", dict.fromkeys(layout for pair in FULL_MOVES for layout in pair))
def test_layouts_of_four(of_four: Path, layout: str):
    """Worst relative difference: loss 3.0e-7 (tp2_pp2), gradient norm 1.2e-6 (tp4); without tp 5.6e-8, 2.6e-7."""
    assert_same_run(of_four, layout)


@pytest.mark.full
@pytest.mark.parametrize("pair", FULL_MOVES, ids="_to_".join)
def test_a_run_goes_on_at_another_layout_of_four(of_four: Path, pair: tuple[str, str]):
    """Worst relative difference: loss 3.0e-7 (from tp2_pp2), gradient norm 1.2e-6 (from tp4)."""
    assert_same_run(of_four, "_to_".join(pair))


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
