"""How far a conversion is: a bar with bytes and remaining time on a terminal, a log line now and then elsewhere."""

import time
from types import TracebackType

from tqdm import tqdm

from qwen3_vlm.logging import get_logger

logger = get_logger(__name__)
LOG_EVERY_S = 30.0


class ByteProgress:
    """Counts bytes of one piece of work.

    Args:
        what: a few words for the line.
        total: bytes in all.
    """

    def __init__(self, what: str, total: int):
        self._what = what
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)
        self._total = total
        self._done = 0
        self._started = self._logged = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self._done += num_bytes
        self._bar.update(num_bytes)
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            rate = self._done / (now - self._started)
            logger.info(
                f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, "
                f"{(self._total - self._done) / rate:.0f} s left"
            )

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
