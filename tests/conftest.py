"""What several rooms' tests share: a one-process topology, and imported models with their transformers answers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from qwen3_vlm.parallel.topology import Topology
    from tests.cases import Case

torch.set_num_threads(1)  # as the processes that tests start have: equal bits need equal sums


@pytest.fixture(scope="session")
def topology() -> "Iterator[Topology]":
    """This process as a world of one, for the whole session."""
    from qwen3_vlm.config.schema import ParallelConfig
    from qwen3_vlm.parallel import topology as topologies

    before = dict(os.environ)
    started = topologies.initialize(ParallelConfig(), seed=1)
    os.environ.clear()  # torchrun's variables must not reach the processes that tests start
    os.environ.update(before)
    yield started
    topologies.shutdown()


@pytest.fixture(scope="session")
def cases(topology: "Topology", tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Case]":
    """Every model of `tests.cases`, imported, with the logits that transformers gives for the prompts."""
    from tests.cases import write_cases

    folder: Path = tmp_path_factory.mktemp("cases")
    return write_cases(folder)
