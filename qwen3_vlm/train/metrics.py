"""What is recorded of a step: names, units, and how each is reduced over the ranks."""

import json
from collections import Counter
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl. Counts are of this step, summed over all ranks."""

    step: int
    """Optimizer steps done, from 1."""
    loss: float | None
    """Mean over the global batch's loss tokens, in nats."""
    grad_norm: float | None
    """Global gradient norm before clipping."""
    lr: float
    tokens: int
    """Tokens of documents; padding is left out."""
    loss_tokens: int
    samples: int
    images: int
    skipped: dict[str, int]
    """Samples left out, by reason."""
    step_time_s: float
    tokens_per_s: float
    images_per_s: float
    tflops_per_gpu: float | None = None
    mfu: float | None = None

    def to_json(self) -> str:
        """One line, floats in full precision."""
        return json.dumps(asdict(self), allow_nan=False)


def count_reasons(reasons: list[str]) -> dict[str, int]:
    """Reason -> number, in alphabetical order."""
    return dict(sorted(Counter(reasons).items()))
