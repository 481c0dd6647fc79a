"""Where visual tokens go: the k-th item to the k-th recorded positions, and nowhere else."""

import pytest
import torch

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.data.sample import MediaBatch
from qwen3_vlm.model.vlm import VLM, place
from qwen3_vlm.parallel.topology import Topology
from tests.unit.model.builders import IMAGE, build_vlm, images

POSITIONS = torch.tensor([2, 3, 4, 5, 9, 10, 11, 12])  # two images of four tokens in a row of 16
OTHERS = [n for n in range(16) if n not in POSITIONS.tolist()]


@pytest.fixture(scope="module")
def model(topology: Topology) -> VLM:
    return build_vlm(topology, ParallelConfig(), {"image": IMAGE}).eval()


@torch.no_grad()
def embed(model: VLM, data: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[t, h] input of the decoder."""
    ids = torch.arange(16)
    return model._embed(ids, ids, {"image": MediaBatch(data=data, positions=positions)}).squeeze(1)


def test_place_puts_each_feature_at_its_position():
    embeddings, features = torch.zeros(6, 1, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    placed = place(embeddings, features, torch.tensor([4, 0, 2]))
    assert placed[:, 0, 0].tolist() == [2, 0, 3, 0, 1, 0]
    assert placed.shape == embeddings.shape and not embeddings.any()


@pytest.mark.parametrize("count", [2, 4])
def test_place_refuses_another_number_of_features(count: int):
    with pytest.raises(ValueError, match=rf"3 placeholder positions but the tower yields {count} embeddings"):
        place(torch.zeros(6, 1, 2), torch.zeros(count, 2), torch.tensor([0, 1, 2]))


def test_an_empty_placement_keeps_the_tower_in_the_graph():
    features = torch.ones(0, 2, requires_grad=True)
    embeddings = torch.ones(3, 1, 2, requires_grad=True)
    place(embeddings, features, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert features.grad is not None


def test_swapped_images_swap_their_rows_alone(model: VLM):
    two = images(2)
    straight, swapped = embed(model, two, POSITIONS), embed(model, two.flip(0), POSITIONS)
    first, second = POSITIONS[:4], POSITIONS[4:]
    assert torch.equal(swapped[OTHERS], straight[OTHERS])
    # Bit-equal: an image's features do not depend on its place in the batch.
    assert torch.equal(swapped[first], straight[second]) and torch.equal(swapped[second], straight[first])
    assert not torch.isclose(straight[first], straight[second]).all()


def test_another_second_image_changes_its_own_rows_alone(model: VLM):
    two = images(2)
    other = torch.stack([two[0], images(1, seed=9)[0]])
    before, after = embed(model, two, POSITIONS), embed(model, other, POSITIONS)
    changed = (before != after).any(-1).nonzero().squeeze(1).tolist()
    assert changed == POSITIONS[4:].tolist()


def test_a_batch_without_images_reaches_the_tower_with_zeros(topology: Topology):
    model = build_vlm(topology, ParallelConfig(), {"image": IMAGE})
    ids = torch.arange(16)
    none = MediaBatch(data=images(0), positions=torch.zeros(0, dtype=torch.int64))
    out = model._embed(ids, ids, {"image": none})
    assert torch.equal(out.squeeze(1), model.language_model.embedding.word_embeddings.weight[ids])
    out.sum().backward()
    tower = model.towers["image"]
    assert all(p.grad is not None and not p.grad.any() for p in tower.parameters())


def test_a_frozen_encoder_keeps_no_activations(topology: Topology):
    model = build_vlm(topology, ParallelConfig(), {"image": IMAGE})
    tower = model.towers["image"]
    tower.encoder.requires_grad_(False)
    seen: list[bool] = []
    tower.resampler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    tower(images(2)).sum().backward()
    assert seen == [False]
    assert tower.resampler.latents.grad.any()
