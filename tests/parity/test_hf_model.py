"""An exported folder in transformers answers as the plain reference and as the Megatron model do.

Logits are of magnitude 3 (largest 4.4). Decoders are random: their answers use few tokens, so ids are compared.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.convert.export import Part, export_hf
from qwen3_vlm.parallel.topology import Topology
from tests.cases import PROMPTS, SPECS, TOLERANCE, Case, jpeg_file, prompt

GENERATED = 32
GENERATING = ["kv1_tied", "kv8_untied", "n20_pooled", "n9_pooled_layer_2"]


@pytest.fixture(scope="module")
def load(cases: dict[str, Case], topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Name of a case -> its exported folder's `path`, `model` and `processor`."""
    root = tmp_path_factory.mktemp("exported")

    @cache
    def loaded(name: str) -> SimpleNamespace:
        path = root / name
        export_hf(checkpoint=cases[name].checkpoint, out=path, part=Part.all)
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, trust_remote_code=True, output_loading_info=True
        )
        assert not any(report.values()), report
        return SimpleNamespace(
            path=path, model=model.eval(), processor=AutoProcessor.from_pretrained(path, trust_remote_code=True)
        )

    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules")):
        yield loaded


def messages(name: str, folder: Path) -> list[dict[str, Any]]:
    """A prompt of `tests.cases` in transformers' form, images in the content."""
    turns, seeds = PROMPTS[name]
    rest = iter(seeds)
    conversation = []
    for role, content in turns:
        parts: list[dict[str, Any]] = []
        for n, words in enumerate(content.split("<image>")):
            if n:
                parts.append({"type": "image", "path": jpeg_file(next(rest), folder)})
            parts.append({"type": "text", "text": words})
        conversation.append({"role": role, "content": parts})
    return conversation


def encoded(exported: SimpleNamespace, names: list[str], folder: Path) -> Any:
    """Prompts as one batch of inputs."""
    return exported.processor.apply_chat_template(
        [messages(name, folder) for name in names],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def logits_of(exported: SimpleNamespace, names: list[str], folder: Path) -> list[Tensor]:
    """[length, v] a prompt, all of them in one left-padded batch."""
    inputs = encoded(exported, names, folder)
    rows = exported.model(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(rows, inputs["attention_mask"], strict=True)]


def generated(exported: SimpleNamespace, names: list[str], folder: Path, **options: Any) -> list[list[int]]:
    """Answers' token ids, without what follows the end of a turn."""
    inputs = encoded(exported, names, folder)
    rows = exported.model.generate(**inputs, max_new_tokens=GENERATED, **options)[:, inputs["input_ids"].shape[1] :]
    stop = set(exported.model.generation_config.eos_token_id)
    answers = []
    for row in rows.tolist():
        end = next((n + 1 for n, token in enumerate(row) if token in stop), len(row))
        answers.append(row[:end])
    return answers


@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_the_references_and_the_megatron_models(
    cases: dict[str, Case], load: Any, topology: Topology, tmp_path: Path, name: str
):
    """Text, one image, many images. Worst difference measured: 3.1e-6 from the reference, 0 from Megatron's."""
    case, exported = cases[name], load(name)
    ours = case.generator(ParallelConfig(), topology)
    for p in PROMPTS:
        (got,) = logits_of(exported, [p], tmp_path)
        torch.testing.assert_close(got, case.expected[p], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(got, ours.logits([prompt(p)])[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", GENERATING)
def test_a_left_padded_batch_gives_every_prompts_own_logits(
    cases: dict[str, Case], load: Any, tmp_path: Path, name: str
):
    """Prompts with 0, 1 and 3 images. Worst difference measured: 2.6e-6."""
    exported = load(name)
    assert not encoded(exported, list(PROMPTS), tmp_path)["attention_mask"][0, 0]
    for p, got in zip(PROMPTS, logits_of(exported, list(PROMPTS), tmp_path), strict=True):
        torch.testing.assert_close(got, cases[name].expected[p], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_answers_equal_the_references_and_the_megatron_models(
    cases: dict[str, Case], load: Any, topology: Topology, tmp_path: Path, name: str
):
    """With a KV cache, alone and in one batch; the others compute every token from the start."""
    case, exported = cases[name], load(name)
    reference = case.reference()
    together = generated(exported, list(PROMPTS), tmp_path)
    ours = case.generator(ParallelConfig(), topology).generate([prompt(p) for p in PROMPTS], max_new_tokens=GENERATED)
    stop = set(exported.model.generation_config.eos_token_id)
    for p, batched, megatron in zip(PROMPTS, together, ours, strict=True):
        turns, seeds = PROMPTS[p]
        files = [jpeg_file(seed, tmp_path) for seed in seeds]
        expected = reference.greedy(reference.prompt_ids(turns), files, max_new_tokens=GENERATED)
        assert batched == expected
        assert generated(exported, [p], tmp_path) == [expected]
        words = [token for token in expected if token not in stop]
        assert megatron == exported.processor.decode(words)


def test_beams_keep_every_prompts_own_images(load: Any, tmp_path: Path):
    """Rows of pixel_values are images, not prompts: repeated image by image, prompts would get each other's."""
    exported = load("n9_pooled_layer_2")
    options = {"num_beams": 3, "num_return_sequences": 2}
    names = list(reversed(PROMPTS))
    alone = [answer for p in names for answer in generated(exported, [p], tmp_path, **options)]
    assert generated(exported, names, tmp_path, **options) == alone


def test_images_are_encoded_once_an_answer(load: Any, tmp_path: Path):
    exported = load("kv1_tied")
    with mock.patch.object(
        type(exported.model.model),
        "get_image_features",
        autospec=True,
        side_effect=type(exported.model.model).get_image_features,
    ) as encode:
        generated(exported, ["three_images"], tmp_path)
    assert encode.call_count == 1


def test_loss_is_the_mean_over_labels_and_logits_can_be_kept_back(load: Any, tmp_path: Path):
    exported = load("kv8_untied")
    inputs = encoded(exported, ["one_image", "text"], tmp_path)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == exported.model.config.image_token_id] = -100
    with torch.no_grad():
        out = exported.model(**inputs, labels=labels)
        kept = exported.model(**inputs, logits_to_keep=3)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(kept.logits, out.logits[:, -3:])
    assert kept.image_hidden_states.shape == (1, 4, 64)


@torch.no_grad()
def test_positions_can_be_given(load: Any, tmp_path: Path):
    exported = load("kv8_untied")
    inputs = encoded(exported, ["one_image"], tmp_path)
    count = torch.arange(inputs["input_ids"].shape[1])[None]
    plain, counted, spread = (
        exported.model(**inputs, **extra).logits for extra in ({}, {"position_ids": count}, {"position_ids": 2 * count})
    )
    torch.testing.assert_close(counted, plain)
    assert (spread - plain).abs().max() > 0.1


def test_gradient_checkpointing_changes_no_gradient(load: Any, cases: dict[str, Case], tmp_path: Path):
    exported = load("kv1_untied")
    inputs = encoded(exported, ["three_images"], tmp_path)
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(exported.path, trust_remote_code=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            flagged = [name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]
            assert any("resampler" in name for name in flagged) and any("vision_tower" in name for name in flagged)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_weights_are_tied_when_the_configuration_says_so(load: Any):
    for name, tied in (("kv1_tied", True), ("kv1_untied", False)):
        model = load(name).model
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_a_saved_model_is_the_same_again(load: Any, tmp_path: Path):
    exported = load("n20_learned_layer_2")
    exported.model.save_pretrained(tmp_path)
    exported.processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    before = exported.model.state_dict()
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert processor.num_image_tokens == 20 and processor.image_processor.size == {"height": 36, "width": 36}


def test_the_bare_model_loads_too(load: Any, tmp_path: Path):
    """Serving engines take the model without its output layer."""
    exported = load("kv8_tied")
    bare = AutoModel.from_pretrained(exported.path, trust_remote_code=True).eval()
    inputs = encoded(exported, ["one_image"], tmp_path)
    with torch.no_grad():
        hidden = bare(**inputs).last_hidden_state
        torch.testing.assert_close(exported.model.lm_head(hidden), exported.model(**inputs).logits)


def test_images_without_their_placeholders_are_refused(load: Any, tmp_path: Path):
    exported = load("kv1_tied")
    inputs = encoded(exported, ["three_images"], tmp_path)
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with pytest.raises(ValueError, match=r"hold 12 image tokens .* make 2 x 4 embeddings"):
        exported.model(**inputs)


def test_an_end_of_turn_ends_an_answer(load: Any):
    exported = load("kv1_tied")
    ids = exported.processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert exported.model.generation_config.eos_token_id == ids
    assert exported.model.generation_config.pad_token_id == ids[1]
