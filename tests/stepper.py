"""Optimizer steps on documents given in the test, without a data set: at any layout, with any parts training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from qwen3_vlm.checkpoint import layout, sharded
from qwen3_vlm.config.schema import OptimConfig, ParallelConfig, PrecisionConfig
from qwen3_vlm.data.chat import ChatEncoder
from qwen3_vlm.data.packing import collate_rows, empty_row, pack_row
from qwen3_vlm.data.sample import EncodedSample, MediaBatch, Message, MicroBatch
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.registry import build_modalities
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.apply import build_stage
from qwen3_vlm.parallel.topology import Topology
from qwen3_vlm.train.batches import StepBatch, StepCounts
from qwen3_vlm.train.optimizer import ProgressSchedule, build_optimizer
from qwen3_vlm.train.step import StepResult, train_step
from tests.cases import FP32, Case
from tests.images import jpeg
from tests.reference import Turn

SEQ_LENGTH = 192
DOCUMENTS: list[tuple[list[Turn], list[int]]] = [
    (
        [
            ("system", "Be brief."),
            ("user", "<image> and <image>?"),
            ("assistant", "A cat."),
            ("user", "Both?"),
            ("assistant", "Yes."),
        ],
        [5, 6],
    ),
    ([("user", "Say a word."), ("assistant", "Word.")], []),
]
"""Turns, and seeds of their images."""


CONNECTOR = ("image.resampler", "image.projector")
EVERYTHING = ("decoder", "image.encoder", *CONNECTOR)


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The batch with every tensor on the device, as StepBatches hands it to a training step."""
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    media = {
        name: MediaBatch(data=items.data.to(device), positions=items.positions.to(device))
        for name, items in batch.media.items()
    }
    return replace(batch, **tensors, media=media)


class Stepper:
    """This rank's stage of a case's model, which takes steps on given rows of documents."""

    def __init__(
        self,
        case: Case,
        topology: Topology,
        parallel: ParallelConfig | None = None,
        trainable: Sequence[str] = CONNECTOR,
        precision: PrecisionConfig = FP32,
        overlap: bool | None = None,
        clip_grad: float = 1.0,
    ):
        parallel = parallel or ParallelConfig()
        self.topology = topology
        architecture = layout.read_architecture(case.checkpoint)
        self.modalities = build_modalities(architecture.modality)
        self.tokenizer = ChatTokenizer.from_folder(case.checkpoint / layout.PROCESSOR, self.modalities)
        self.model, self.wrapped = build_stage(
            lambda: VLM(
                decoder=architecture.model,
                modalities=architecture.modality,
                parallel=parallel,
                precision=precision,
                topology=topology,
            ),
            lambda stage: sharded.load_model(stage, case.checkpoint / layout.STATE),
            trainable=trainable,
            precision=precision,
            device=topology.backend.device,
            overlap=overlap,
        )
        optim = OptimConfig(lr=1e-3, warmup_fraction=0.0, decay="constant", clip_grad=clip_grad)
        self.optimizer = build_optimizer(optim, precision, self.wrapped)
        self.schedule = ProgressSchedule(self.optimizer, optim, 10)

    def document(self, turns: Sequence[Turn], seeds: Sequence[int]) -> EncodedSample:
        """Encode a conversation and its images."""
        messages = [Message(role=role, content=content) for role, content in turns]
        tokens = ChatEncoder(self.tokenizer, self.modalities).encode_conversation(messages, {"image": len(seeds)})
        image = self.modalities["image"]
        items = [image.preprocess(jpeg(seed)) for seed in seeds]
        return EncodedSample(
            key="",
            input_ids=tokens.input_ids,
            is_target=tokens.is_target,
            media_positions=tokens.media_positions,
            media_files={},
            media={"image": torch.stack(items) if items else torch.empty((0, *image.media_shape), dtype=torch.uint8)},
        )

    def micro_batch(self, *rows: Sequence[EncodedSample]) -> MicroBatch:
        """Rows of documents end to end, on the backend's device; an empty one is padding."""
        fixed = {"seq_length": SEQ_LENGTH, "pad_id": self.tokenizer.pad_id, "modalities": self.modalities}
        batch = collate_rows([pack_row(row, **fixed) if row else empty_row(**fixed) for row in rows])
        return on_device(batch, self.topology.backend.device)

    def take(self, *micro_batches: MicroBatch) -> StepResult:
        """One optimizer step; each data-parallel rank gives its own micro batches, as many as the others."""
        counts = torch.tensor(
            [sum(int(m.loss_mask.sum()) for m in micro_batches), sum(m.num_samples for m in micro_batches)],
            device=self.topology.backend.device,  # nccl takes nothing else
        )
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        loss_tokens, samples = (int(count) for count in counts)
        return train_step(
            StepBatch(micro_batches=list(micro_batches), counts=StepCounts(loss_tokens=loss_tokens, samples=samples)),
            model=self.wrapped,
            optimizer=self.optimizer,
            schedule=self.schedule,
            units=1,
            seq_length=SEQ_LENGTH,
            micro_batch_size=micro_batches[0].input_ids.numel() // SEQ_LENGTH,
            topology=self.topology,
        )

    def take_share(self, *micro_batches: MicroBatch) -> StepResult:
        """One optimizer step on a global batch, which the data-parallel ranks take turns at."""
        return self.take(*micro_batches[self.topology.dp_rank :: self.topology.dp_size])

    def save(self, folder: Path) -> None:
        """Write model, optimizer and schedule."""
        if self.topology.rank == 0:
            folder.mkdir()
        dist.barrier()
        sharded.save_run(self.model, self._run_state(), folder)

    def load(self, folder: Path, *, same_layout: bool = False) -> None:
        """Go on from what any layout wrote; with its random streams if it is this one."""
        sharded.load_run(self.model, self._run_state(), folder, same_layout=same_layout)

    def _run_state(self) -> sharded.RunState:
        return sharded.RunState(optimizer=self.optimizer, scheduler=self.schedule.scheduler)
