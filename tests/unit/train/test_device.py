"""The tests' own steps put every tensor on the backend's device: seen here on torch's `meta` device, without a GPU."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from qwen3_vlm.parallel.topology import Topology
from tests.cases import Case
from tests.isolation import whole_row
from tests.stepper import DOCUMENTS, Stepper

META = torch.device("meta")


class Reached(Exception):
    pass


@pytest.fixture
def stepper(cases: dict[str, Case], topology: Topology) -> Stepper:
    return Stepper(cases["kv1_tied"], topology)


def elsewhere(stepper: Stepper) -> None:
    """From here on the stepper's device is another."""
    stepper.topology = replace(stepper.topology, backend=replace(stepper.topology.backend, device=META))


def test_a_batch_lies_on_the_device(stepper: Stepper):
    elsewhere(stepper)
    batch = stepper.micro_batch([stepper.document(*document) for document in DOCUMENTS], [])
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens"}
    tensors |= {f"{name}.{part}": tensor for name, items in batch.media.items() for part, tensor in vars(items).items()}
    assert tensors.keys() >= {"image.data", "image.positions"}
    assert {name: tensor.device for name, tensor in tensors.items()} == dict.fromkeys(tensors, META)
    assert batch.num_samples == len(DOCUMENTS)


def test_counts_are_reduced_on_the_device(stepper: Stepper):
    batch = stepper.micro_batch([stepper.document(*DOCUMENTS[1])])
    elsewhere(stepper)
    with mock.patch("tests.stepper.dist.all_reduce", side_effect=Reached) as all_reduce, pytest.raises(Reached):
        stepper.take(batch)
    assert all_reduce.call_args.args[0].device == META


def test_planted_boundaries_lie_beside_the_batchs():
    class Elsewhere(torch.Tensor):
        device = META

    boundaries = torch.tensor([0, 384], dtype=torch.int32).as_subclass(Elsewhere)
    assert whole_row(boundaries, 384).cu_seqlens_q.device == META
