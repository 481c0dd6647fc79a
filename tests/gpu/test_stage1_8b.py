"""One step of stage 1 at the size of Qwen3-8B and SigLIP2 so400m, random weights; never run yet."""

import math

import torch

from qwen3_vlm.config.compose import compose
from qwen3_vlm.data.packing import collate_rows, pack_row
from qwen3_vlm.data.sample import EncodedSample
from qwen3_vlm.modality.registry import build_modalities
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.apply import build_stage
from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.batches import StepBatch, StepCounts
from qwen3_vlm.train.optimizer import ProgressSchedule, build_optimizer
from qwen3_vlm.train.step import train_step
from tests.stepper import on_device

NUM_DOCUMENTS, TEXT_TOKENS = 30, 60
MEMORY_BYTES = 75 * 2**30
"""Of an H100's 80 GB; a frozen 8.19B decoder alone was measured to take 44 GiB at 8k tokens."""


def _document(number: int, config, generator: torch.Generator) -> EncodedSample:
    """Random words around an image of its own; the second half of the words is the answer."""
    image = config.modality["image"]
    placeholders = image.resampler.num_tokens
    length = placeholders + TEXT_TOKENS
    targets = torch.arange(length) >= length - TEXT_TOKENS // 2
    side = image.encoder.image_size
    return EncodedSample(
        key=str(number),
        input_ids=torch.randint(0, config.model.vocab_size, (length,), generator=generator),
        is_target=targets,
        media_positions={"image": torch.arange(1, 1 + placeholders)},
        media_files={},
        media={"image": torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)},
    )


def test_one_step(topology: Topology):
    overrides = ["model=qwen3_8b", "modality=siglip2_so400m_384", "data.path=unused", "exp_dir=unused"]
    config = compose("stage1_align", overrides)
    modalities = build_modalities(config.modality)
    torch.cuda.reset_peak_memory_stats()
    model, wrapped = build_stage(
        lambda: VLM(
            decoder=config.model,
            modalities=config.modality,
            parallel=config.parallel,
            precision=config.precision,
            topology=topology,
        ),
        lambda stage: None,
        trainable=config.train.trainable,
        precision=config.precision,
        device=topology.backend.device,
    )
    optimizer = build_optimizer(config.optim, config.precision, wrapped)
    generator = torch.Generator().manual_seed(0)
    documents = [_document(n, config, generator) for n in range(NUM_DOCUMENTS)]
    row = pack_row(documents, seq_length=config.train.seq_length, pad_id=0, modalities=modalities)
    batch = on_device(collate_rows([row]), topology.backend.device)
    before = {name: p.detach().float().sum().item() for name, p in model.named_parameters()}
    loss_tokens = NUM_DOCUMENTS * TEXT_TOKENS // 2
    result = train_step(
        StepBatch(micro_batches=[batch], counts=StepCounts(rows=1, samples=NUM_DOCUMENTS, loss_tokens=loss_tokens)),
        model=wrapped,
        optimizer=optimizer,
        schedule=ProgressSchedule(optimizer, config.optim, 1),
        units=1,
        seq_length=config.train.seq_length,
        micro_batch_size=1,
        topology=topology,
    )
    # Logits of random weights have a variance of about 4096 * 0.02^2 = 1.6, which adds half of it to log(vocabulary).
    assert result.loss is not None and abs(result.loss - math.log(config.model.vocab_size)) < 2
    assert result.grad_norm is not None and math.isfinite(result.grad_norm) and result.grad_norm > 0
    changed = {name for name, p in model.named_parameters() if p.detach().float().sum().item() != before[name]}
    assert changed and all(name.startswith(("towers.image.resampler.", "towers.image.projector.")) for name in changed)
    assert torch.cuda.max_memory_allocated() < MEMORY_BYTES
