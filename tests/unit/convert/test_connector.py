"""The fresh resampler and projector: seeded, and exactly what the model has."""

from dataclasses import replace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from qwen3_vlm.config.schema import ModalityConfig, ParallelConfig, ResamplerConfig
from qwen3_vlm.convert.connector import connector_shapes, fresh_connector
from qwen3_vlm.parallel.topology import Topology
from tests.unit.model.builders import DECODER, IMAGE, build_vlm

TOWER = "towers.image."


def fresh(seed: int, modality: ModalityConfig = IMAGE, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return fresh_connector(modality, DECODER, TOWER, seed=seed, dtype=dtype)


def test_a_seed_defines_every_tensor():
    a, b, c = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name], c[name]) == ("norm." in name) for name in a)


def test_another_depth_leaves_the_other_tensors_alone():
    deeper = replace(IMAGE, resampler=replace(IMAGE.resampler, depth=IMAGE.resampler.depth + 1))
    shallow, deep = fresh(1), fresh(1, deeper)
    assert shallow.keys() < deep.keys()
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)


@pytest.mark.parametrize(
    "resampler", [ResamplerConfig(num_tokens=4, depth=1), ResamplerConfig(num_tokens=9, depth=3, ffn_multiplier=2)]
)
def test_names_and_shapes_are_the_models(topology: Topology, resampler: ResamplerConfig):
    modality = replace(IMAGE, resampler=resampler)
    model = build_vlm(topology, ParallelConfig(), {"image": modality})
    held = {
        tensor.key: tuple(tensor.global_shape)
        for tensor in model.sharded_state_dict().values()
        if isinstance(tensor, ShardedTensor) and (".resampler." in tensor.key or ".projector." in tensor.key)
    }
    assert connector_shapes(modality, DECODER, TOWER) == held
    assert {name: tuple(t.shape) for name, t in fresh(1, modality).items()} == held


def test_values_start_as_documented():
    tensors = fresh(1, dtype=torch.bfloat16)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    weight = tensors[f"{TOWER}projector.encoder.linear_fc1.weight"].float()
    bound = weight.shape[1] ** -0.5
    assert 0.9 * bound < weight.abs().max() <= bound * 1.01  # torch.nn.Linear's bound; BF16 rounds by up to 0.4%
    assert tensors[f"{TOWER}resampler.final_norm.weight"].eq(1).all()
    assert tensors[f"{TOWER}resampler.final_norm.bias"].eq(0).all()
    assert 0.015 < tensors[f"{TOWER}resampler.latents"].float().std() < 0.025
