"""What a rank keeps for training, against plain arithmetic over the shapes of the tensors that train."""

import math
from pathlib import Path

import pytest

from qwen3_vlm.config.schema import ParallelConfig, PrecisionConfig
from qwen3_vlm.parallel.topology import Topology
from tests.cases import FP32, Case, open_cases
from tests.distributed.checks import layout
from tests.distributed.launch import launch
from tests.stepper import CONNECTOR, EVERYTHING, Stepper

PRECISIONS = (FP32, PrecisionConfig(), PrecisionConfig(name="bf16_reduced", grad_reduce_in_fp32=False))
TENSOR_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128
"""Elements; megatron-core 0.16.1, _ParamAndGradBuffer."""


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _check(stepper: Stepper, precision: PrecisionConfig, dp_rank: int, dp_size: int) -> None:
    trained = [p for p in stepper.model.parameters() if p.requires_grad]
    # Tensors lie in one buffer, the last one first; each data-parallel rank updates an equal share of it.
    spans, end = [], 0
    for p in reversed(trained):
        start = _round_up(end, TENSOR_ALIGNMENT)
        end = start + math.prod(p.shape)
        spans.append((start, end))
    size = _round_up(end, math.lcm(BUFFER_ALIGNMENT, dp_size))
    first, last = dp_rank * size // dp_size, (dp_rank + 1) * size // dp_size
    updated = sum(max(0, min(b, last) - max(a, first)) for a, b in spans)

    weight_bytes = 4 if precision.params_dtype == "fp32" else 2
    gradient_bytes = 4 if precision.grad_reduce_in_fp32 else weight_bytes
    buffers = stepper.wrapped.buffers
    assert sum(buffer.grad_data.nbytes for buffer in buffers) == size * gradient_bytes
    assert sum(buffer.param_data.nbytes for buffer in buffers) == size * weight_bytes

    [part] = stepper.optimizer.chained_optimizers
    state = part.optimizer.state.values()
    assert sum(tensor.nbytes for kept in state for tensor in kept.values()) == 2 * 4 * updated
    masters = [p for group in part.shard_fp32_from_float16_groups for p in group if p is not None]
    assert sum(p.nbytes for p in masters) == (0 if weight_bytes == 4 else 4 * updated)

    buffered = {p for buffer in buffers for p in buffer.params}
    assert buffered == set(trained) and len(trained) < len(list(stepper.model.parameters()))
    assert all(not hasattr(p, "main_grad") for p in stepper.model.parameters() if not p.requires_grad)


def _check_all(case: Case, topology: Topology) -> None:
    for precision in PRECISIONS:
        for trainable in (CONNECTOR, [part for part in EVERYTHING if part != "image.encoder"]):
            stepper = Stepper(case, topology, trainable=trainable, precision=precision)
            stepper.take(stepper.micro_batch([stepper.document([("user", "A?"), ("assistant", "B")], [])]))
            _check(stepper, precision, topology.dp_rank, topology.dp_size)


def check_share(folder: Path) -> None:
    """Each of several data-parallel ranks."""
    with layout(ParallelConfig()) as topology:
        _check_all(open_cases(folder / "cases", ["kv1_tied"])["kv1_tied"], topology)


def test_one_process(cases: dict[str, Case], topology: Topology):
    _check_all(cases["kv1_tied"], topology)


@pytest.mark.parametrize("dp_size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_data_parallel_ranks_share_the_optimizer(dp_size: int, cases: dict[str, Case], tmp_path: Path):
    (tmp_path / "cases").symlink_to(cases["kv1_tied"].folder.parent)
    results = launch([check_share], num_processes=dp_size, folder=tmp_path)
    results.require(check_share)
