"""One training step's loss and gradients, here or in a process that sees no GPU.

    python -m tests.first_step CASES_FOLDER CASE OUT

takes the step in FP32 on the CPU, as a machine without GPU and TransformerEngine would.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from qwen3_vlm.config.schema import PrecisionConfig
    from qwen3_vlm.parallel.topology import Topology
    from tests.cases import Case

ROOT = Path(__file__).parents[1]
LIMIT_S = 240
BF16_LOSS = 2**-8
"""Relative bound of BF16's loss against FP32's: one rounding of BF16, whose mantissa has 8 bits."""
BF16_GRADIENT = 20 * 2**-8
"""Bound of |difference| / |gradient| of a tensor, BF16 against FP32: 7.8e-2, twice what BF16 on a CPU was measured at
(4.0e-2, test_first_step.py). megatron-core on TransformerEngine was measured at 1.0e-2 for the input embeddings."""


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """What a step leaves, on the CPU."""

    loss: float
    gradients: dict[str, Tensor]
    """Name under which the checkpoint holds Adam's first moment -> (1 - beta1) * gradient, FP32; layers one by one."""


def take(case: "Case", topology: "Topology", precision: "PrecisionConfig", out: Path) -> FirstStep:
    """One step on two micro batches (the second without image), decoder and connector learning, nothing clipped.

    Args:
        case: the model.
        topology: of one process.
        precision: of the model.
        out: a new folder, for a save and the loss.
    """
    from tests.stepper import CONNECTOR, DOCUMENTS, Stepper

    stepper = Stepper(case, topology, trainable=("decoder", *CONNECTOR), precision=precision, clip_grad=0.0)
    result = stepper.take(*(stepper.micro_batch([stepper.document(*document)]) for document in DOCUMENTS))
    out.mkdir()
    stepper.save(out / "state")
    (out / "loss.json").write_text(json.dumps(result.loss))
    return read(out)


def read(out: Path) -> FirstStep:
    """What `take` wrote."""
    from tests.saved import GRADIENT, read_tensors

    return FirstStep(loss=json.loads((out / "loss.json").read_text()), gradients=read_tensors(out / "state", GRADIENT))


def take_on_cpu(case: "Case", out: Path) -> FirstStep:
    """`take` in FP32, in a process of its own that sees no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.first_step", str(case.folder.parent), case.folder.name, str(out)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return read(out)


def main(folder: Path, name: str, out: Path) -> None:
    """Entry of the process."""
    # megatron-core takes kernels of both for its gradient norm wherever they can be imported, GPU or not.
    sys.modules["transformer_engine"] = sys.modules["apex"] = None  # type: ignore[assignment]
    from qwen3_vlm.config.schema import ParallelConfig
    from qwen3_vlm.parallel import topology as topologies
    from tests.cases import FP32, open_cases

    topology = topologies.initialize(ParallelConfig(), seed=1)
    assert topology.backend.name == "cpu" and not topology.backend.has_te
    take(open_cases(folder, [name])[name], topology, FP32, out)
    topologies.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
