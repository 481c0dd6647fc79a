"""FP32 logits and features of imported models equal transformers' in one process.

Logits are of magnitude 3 (largest 4.4), features of magnitude 4.
"""

import pytest
import torch

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.parallel.topology import Topology
from tests.cases import NEW_TOKENS, PROMPTS, SPECS, TOLERANCE, Case, jpeg_file, prompt
from tests.images import jpeg

ALONE = ParallelConfig()


@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_transformers(cases: dict[str, Case], topology: Topology, name: str):
    """Worst difference measured: 0 without images, 3.1e-6 with them (n9_learned)."""
    case = cases[name]
    generator = case.generator(ALONE, topology)
    together = generator.logits([prompt(p) for p in PROMPTS])
    for p, packed in zip(PROMPTS, together, strict=True):
        (alone,) = generator.logits([prompt(p)])
        for got in (alone, packed):
            torch.testing.assert_close(got, case.expected[p], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["kv1_tied", "n9_pooled_layer_2"])
def test_tower_features_equal_transformers(cases: dict[str, Case], topology: Topology, name: str):
    """Worst difference measured: 1.5e-6."""
    case = cases[name]
    loaded = case.load(ALONE, topology)
    pixels = torch.stack([loaded.modalities["image"].preprocess(jpeg(seed)) for seed in range(3)])
    with torch.no_grad():
        features_piw = loaded.model.towers["image"].encoder(pixels)
    reference = case.reference()
    expected = reference.features(reference.pixels([jpeg_file(seed, case.folder) for seed in range(3)]))
    assert features_piw.shape == (16, 3, 48)
    torch.testing.assert_close(features_piw.transpose(0, 1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", SPECS)
def test_greedy_answers_equal_transformers(cases: dict[str, Case], topology: Topology, name: str):
    case = cases[name]
    answers = case.generator(ALONE, topology).generate([prompt(p) for p in PROMPTS], max_new_tokens=NEW_TOKENS)
    assert answers == [case.answers[p] for p in PROMPTS]
