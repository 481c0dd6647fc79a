"""A checkpoint -> a model in memory at any layout, with its tokenizer and modalities: what generation and evaluation
start from.
"""

from dataclasses import dataclass
from pathlib import Path

from qwen3_vlm.checkpoint import layout, sharded
from qwen3_vlm.config.schema import ParallelConfig, PrecisionConfig
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.base import Modality
from qwen3_vlm.modality.registry import build_modalities
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """One rank's part of a model, and what prepares its input."""

    model: VLM
    tokenizer: ChatTokenizer
    modalities: dict[str, Modality]


def load_vlm(
    checkpoint: str | Path, *, parallel: ParallelConfig, precision: PrecisionConfig, topology: Topology
) -> LoadedModel:
    """Load CKPT for inference.

    Args:
        checkpoint: import's --out, a saved step, or an exp_dir.
        parallel, precision: how it is cut and computed.
        topology: where this process stands.

    Raises:
        CheckpointError: there is no checkpoint, or it is incomplete.
    """
    directory = layout.resolve(checkpoint)
    architecture = layout.read_architecture(directory)
    model = VLM(
        decoder=architecture.model,
        modalities=architecture.modality,
        parallel=parallel,
        precision=precision,
        topology=topology,
    ).to(topology.backend.device)
    sharded.load_model(model, directory / layout.STATE)
    modalities = build_modalities(architecture.modality)
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=ChatTokenizer.from_folder(directory / layout.PROCESSOR, modalities),
        modalities=modalities,
    )
