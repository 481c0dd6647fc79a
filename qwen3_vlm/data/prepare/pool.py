"""Tasks in worker processes, a bounded number at a time, in order."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from qwen3_vlm.errors import DataError

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""

_work: Callable[[Any], Any]
"""What this worker process does; set once, when it starts."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call."""

    name: str
    """For messages."""
    size: int
    """Steps of the progress bar."""
    payload: Any
    """Pickled on the way to the worker; None: done by an earlier run, only counted."""


def run_tasks(tasks: Iterable[Task], work: Callable[[Any], Any], *, jobs: int, title: str, unit: str) -> Iterator[Any]:
    """Results of `work(payload)` in the order of the tasks; None for those without payload.

    Args:
        tasks: drawn as they are needed.
        work: inherited by the forked workers, so that a closure over large things costs nothing.
        jobs: processes; one, too, runs outside of this process, so that a crash in a codec is an error here.
        title: of the progress bar.
        unit: of the progress bar.

    Raises:
        DataError: a worker process died.
    """
    waiting: deque[tuple[Task, Future[Any] | None]] = deque()
    context = get_context("fork")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(work, os.getpid()))

    def first() -> Any:
        task, future = waiting.popleft()
        try:
            result = None if future is None else future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died at or before {task.name}: killed for memory, or by a broken file; run the "
                "command again, with fewer --jobs if memory is short"
            ) from error
        bar.update(task.size)
        return result

    with pool, tqdm(desc=title, unit=unit, disable=None) as bar:
        try:
            for task in tasks:
                waiting.append((task, None if task.payload is None else pool.submit(_call, task.payload)))
                while len(waiting) > 4 * jobs:
                    yield first()
            while waiting:
                yield first()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    # A worker whose parent was killed would wait for its next task for ever: its siblings hold the queue open.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _call(payload: Any) -> Any:
    return _work(payload)
