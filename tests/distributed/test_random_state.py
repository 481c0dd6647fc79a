"""Random streams come back with a save at its own tp and pp; at others they start from the seed, as in a new run."""

import functools
import json
from pathlib import Path

import torch
from megatron.core import tensor_parallel

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.parallel.topology import Topology
from tests.cases import Case, open_cases
from tests.distributed.checks import layout
from tests.distributed.launch import launch
from tests.stepper import Stepper

TP2, PP2 = ParallelConfig(tp=2), ParallelConfig(pp=2)


def draw() -> list[list[float]]:
    """The next numbers of torch's stream and of the model-parallel one."""
    numbers = [torch.rand(4).tolist()]
    with tensor_parallel.get_cuda_rng_tracker().fork():
        numbers.append(torch.rand(4, device=torch.cuda.current_device()).tolist())
    return numbers


def _stepper(folder: Path, topology: Topology, parallel: ParallelConfig) -> Stepper:
    return Stepper(open_cases(folder / "cases", ["kv1_tied"])["kv1_tied"], topology, parallel)


def save(folder: Path) -> None:
    """At TP2, with streams that no longer stand where a new run's do."""
    with layout(TP2) as topology:
        stepper = _stepper(folder, topology, TP2)
        fresh = draw()
        stepper.save(folder / "saved")
        after = draw()
        assert all(a != b for a, b in zip(fresh, after, strict=True))
        (folder / f"after_{topology.rank}.json").write_text(json.dumps(after))


def load(folder: Path, parallel: ParallelConfig, same_layout: bool) -> None:
    """Each rank goes on where it stood, or starts as a new run does."""
    with layout(parallel) as topology:
        _stepper(folder, topology, parallel)
        fresh = draw()
        saved = json.loads((folder / f"after_{topology.rank}.json").read_text())
        assert all(a != b for a, b in zip(fresh, saved, strict=True))
    with layout(parallel) as topology:
        _stepper(folder, topology, parallel).load(folder / "saved", same_layout=same_layout)
        assert draw() == (saved if same_layout else fresh)


def test_one_process(cases: dict[str, Case], topology: Topology, tmp_path: Path):
    stepper = Stepper(cases["kv1_tied"], topology)
    fresh = draw()
    stepper.save(tmp_path / "saved")
    after = draw()
    assert all(a != b for a, b in zip(fresh, after, strict=True))
    draw()
    stepper.load(tmp_path / "saved", same_layout=True)
    assert draw() == after
    further = draw()
    stepper.load(tmp_path / "saved", same_layout=True)
    draw()
    stepper.load(tmp_path / "saved", same_layout=False)  # leaves them where they stand
    assert draw() == further


def test_two_processes(cases: dict[str, Case], tmp_path: Path):
    (tmp_path / "cases").symlink_to(cases["kv1_tied"].folder.parent)
    checks = [
        save,
        functools.partial(load, parallel=TP2, same_layout=True),
        functools.partial(load, parallel=PP2, same_layout=False),
    ]
    results = launch(checks, num_processes=2, folder=tmp_path)
    for check in checks:
        results.require(check)
    of_ranks = [json.loads((tmp_path / f"after_{rank}.json").read_text()) for rank in (0, 1)]
    assert of_ranks[0][1] != of_ranks[1][1]  # the model-parallel stream is the rank's own
