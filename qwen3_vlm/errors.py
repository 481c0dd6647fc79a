"""The project's exceptions. A message says what was found, what was expected, where, and what to do."""


class Qwen3VLMError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(Qwen3VLMError, ValueError):
    """The run was asked for something that cannot be: raised before any model is built."""


class DataError(Qwen3VLMError):
    """A data set as a whole cannot be used (missing folder, wrong form); single bad samples are `BadSample`."""


class BadSample(Qwen3VLMError):
    """One sample cannot be used.

    Args:
        reason: a short snake_case word; skipped samples are counted under it (`metrics.jsonl`, key `skipped`).
        detail: one sentence with the numbers and names.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CheckpointError(Qwen3VLMError):
    """A checkpoint is missing, incomplete, of an unknown format, or does not fit the run."""


class WeightsError(Qwen3VLMError):
    """Weights of a Hugging Face folder do not fit: unused, missing or misshapen tensors."""


class DiskFullError(Qwen3VLMError):
    """There is no room for what is to be written."""


class TrainingError(Qwen3VLMError):
    """A run cannot go on: the numbers are broken."""
