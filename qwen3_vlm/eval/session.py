"""What a command that asks a checkpoint something has in common: layout from overrides, distributed start, a loaded
generator.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen3_vlm.checkpoint.layout import read_architecture
from qwen3_vlm.config.compose import compose
from qwen3_vlm.config.validate import validate
from qwen3_vlm.eval.generate import GreedyGenerator
from qwen3_vlm.parallel import topology as topologies
from qwen3_vlm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Session:
    """A generator, and where this process stands."""

    generator: GreedyGenerator
    topology: Topology


@contextlib.contextmanager
def open_session(checkpoint: str, overrides: Sequence[str]) -> Iterator[Session]:
    """Load a checkpoint at the layout that the overrides ask for; closes torch.distributed at the end.

    Args:
        checkpoint: import's --out, a saved step, or an exp_dir.
        overrides: parallel=..., precision=... as for the trainer; precision is fp32 unless given.

    Raises:
        ConfigError: an override is unknown, or the layout does not fit the model or the world.
        CheckpointError: there is no checkpoint.
    """
    precision = [] if any(o.startswith("precision=") for o in overrides) else ["precision=fp32"]
    world_size = topologies.world_size_from_env()
    longest = read_architecture(checkpoint).model.max_position_embeddings
    base = [
        *("model=from_checkpoint", f"checkpoint.init_from={checkpoint}", "exp_dir=unused", "data.path=unused"),
        # What training asks for and inference has no use for, set to what always holds.
        *(f"train.seq_length={longest}", f"train.global_batch_size={world_size}", "train.micro_batch_size=1"),
    ]
    config = compose("stage1_align", [*base, *precision, *overrides], read_architecture=read_architecture)
    validate(config, world_size)
    topology = topologies.initialize(config.parallel, seed=config.train.seed)
    try:
        from qwen3_vlm.checkpoint.load import load_vlm

        loaded = load_vlm(checkpoint, parallel=config.parallel, precision=config.precision, topology=topology)
        yield Session(
            generator=GreedyGenerator(loaded.model, loaded.tokenizer, loaded.modalities, topology), topology=topology
        )
    finally:
        topologies.shutdown()
