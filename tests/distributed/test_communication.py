"""Nothing hangs where ranks see different images, and overlapping communication with computation changes no number.

The trap: a rank whose micro batch has no image leaves the encoder's collectives out, and the others wait for ever
(ms-swift issue 9104, trl issue 3934). Every start here has a time limit.
"""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.model.tower import ModalityTower
from tests.cases import Case, open_cases
from tests.distributed.checks import layout
from tests.distributed.launch import Check, launch
from tests.saved import read_tensors, relative_differences
from tests.stepper import CONNECTOR, EVERYTHING, Stepper

LIMIT_S = 90
PARTS = {"everything": EVERYTHING, "frozen_tower": ("decoder", *CONNECTOR), "connector": CONNECTOR}
IMAGES = [[2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
"""Per step, images of the micro batches; two data-parallel ranks take turns at them."""
TP2, DP2, PP2 = ParallelConfig(tp=2), ParallelConfig(), ParallelConfig(pp=2)


def _steps(stepper: Stepper) -> list[tuple[float | None, float | None]]:
    results = []
    for images in IMAGES:
        documents = [
            stepper.document([("user", "<image>" * count + "What?"), ("assistant", f"No. {n}")], range(n, n + count))
            for n, count in enumerate(images)
        ]
        results.append(stepper.take_share(*(stepper.micro_batch([document]) for document in documents)))
    return [(result.loss, result.grad_norm) for result in results]


def _stepper(folder: Path, topology, parallel: ParallelConfig, parts: str, *, overlap: bool = False) -> Stepper:
    case = open_cases(folder / "cases", ["kv1_tied"])["kv1_tied"]
    return Stepper(case, topology, parallel, PARTS[parts], overlap=overlap)


def different_images(folder: Path, parallel: ParallelConfig, parts: str) -> None:
    """Steps whose micro batches have two, one or no image, and none at all in the last."""
    with layout(parallel) as topology:
        results = _steps(_stepper(folder, topology, parallel, parts))
        file = folder / f"{parts}_{topology.rank}.json"
        file.write_text(json.dumps(results))


def one_rank_skips(folder: Path) -> None:
    """The planted bug: the second tensor rank leaves the tower out of batches without an image."""
    whole = ModalityTower.forward

    def forward(self: ModalityTower, media: torch.Tensor) -> torch.Tensor:
        if len(media) == 0 and dist.get_rank() == 1:
            return media.new_zeros((0, 64), dtype=torch.float32)
        return whole(self, media)

    with layout(TP2) as topology, mock.patch.object(ModalityTower, "forward", forward):
        _steps(_stepper(folder, topology, TP2, "everything"))


def one_rank_is_late(folder: Path) -> None:
    """A rank that never comes to the others' collective."""
    with layout(DP2) as topology:
        if topology.rank == 1:
            time.sleep(600)
        dist.barrier()


def overlap(folder: Path, parallel: ParallelConfig) -> None:
    """The same steps with communication in one piece behind the backward pass, and overlapping it in many buckets."""
    small = functools.partial(DistributedDataParallelConfig, bucket_size=4000)
    starts = []
    start = _ParamAndGradBucketGroup.start_grad_sync

    def recorded(self: _ParamAndGradBucketGroup, **options: bool) -> None:
        starts.append(torch._C._current_graph_task_id())
        start(self, **options)

    with layout(parallel) as topology:
        for on in (False, True):
            with (
                mock.patch("qwen3_vlm.parallel.apply.DistributedDataParallelConfig", small),
                mock.patch.object(_ParamAndGradBucketGroup, "start_grad_sync", recorded),
            ):
                starts.clear()
                stepper = _stepper(folder, topology, parallel, "everything", overlap=on)
                results = _steps(stepper)
            in_backward = sum(task != -1 for task in starts)
            # Which parameters a bucket waits for is learnt in the first step; from the second on all overlap.
            assert in_backward == (len(stepper.wrapped.bucket_groups) * (len(IMAGES) - 1) if on else 0)
            if on and topology.is_first_stage:
                assert len(stepper.wrapped.bucket_groups) > 10
            stepper.save(folder / f"overlap_{on}")
            if topology.rank == 0:
                (folder / f"overlap_{on}.json").write_text(json.dumps(results))


def _folder(cases: dict[str, Case], tmp_path: Path) -> Path:
    (tmp_path / "cases").symlink_to(cases["kv1_tied"].folder.parent)
    return tmp_path


def _run(checks: Sequence[Check], folder: Path, *, num_processes: int = 2, limit_s: float = LIMIT_S) -> None:
    results = launch(checks, num_processes=num_processes, folder=folder, timeout_s=limit_s)
    for check in checks:
        results.require(check)


@pytest.mark.parametrize("parallel", [TP2, DP2], ids=["tp2", "dp2"])
def test_ranks_with_different_images_go_on(parallel: ParallelConfig, cases: dict[str, Case], tmp_path: Path):
    folder = _folder(cases, tmp_path)
    _run([functools.partial(different_images, parallel=parallel, parts=parts) for parts in PARTS], folder)
    for parts in PARTS:
        first, second = (json.loads((folder / f"{parts}_{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        assert all(loss > 0 for loss, _ in first)
        # Without any image the connector learns nothing; what trains beside it does.
        assert [norm > 0 for _, norm in first] == [True, True, parts != "connector"]


def test_a_rank_that_skips_the_tower_is_found_out(cases: dict[str, Case], tmp_path: Path):
    """It hangs or, where gloo sees that sizes differ, fails; either way the start ends and the test fails."""
    with pytest.raises(pytest.fail.Exception):
        _run([one_rank_skips], _folder(cases, tmp_path), limit_s=10)


def test_a_hang_is_ended_and_named(tmp_path: Path):
    with pytest.raises(pytest.fail.Exception, match=r"one_rank_is_late has no outcome on ranks \[0, 1\].*hung"):
        _run([one_rank_is_late], tmp_path, limit_s=4)


@pytest.mark.parametrize(
    ("num_processes", "parallel"),
    [(2, DP2), pytest.param(4, PP2, marks=pytest.mark.full), pytest.param(4, TP2, marks=pytest.mark.full)],
    ids=["dp2", "pp2dp2", "tp2dp2"],
)
def test_overlap_changes_no_number(
    num_processes: int, parallel: ParallelConfig, cases: dict[str, Case], tmp_path: Path
):
    """Gloo does it too, if asked. A gradient norm adds up other shards (4e-7 apart), so clipping scales otherwise.

    Worst relative after three steps: loss 5e-8, a saved tensor 3.3e-6 (a key bias, whose gradient is rounding noise).
    """
    folder = _folder(cases, tmp_path)
    _run([functools.partial(overlap, parallel=parallel)], folder, num_processes=num_processes)
    plain, overlapping = (json.loads((folder / f"overlap_{on}.json").read_text()) for on in (False, True))
    assert plain[0][0] == overlapping[0][0]
    torch.testing.assert_close(torch.tensor(plain), torch.tensor(overlapping), rtol=1e-6, atol=0)
    apart = relative_differences(*(read_tensors(folder / f"overlap_{on}") for on in (False, True)))
    assert max(apart.values()) <= 1e-5
