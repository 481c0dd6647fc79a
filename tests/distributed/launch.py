"""Run functions in n gloo processes, with a time limit; what a test module starts as a program, too.

    results = launch([check_logits, check_shapes], num_processes=2, folder=tmp_path)
    results.require(check_logits)      # fails with the tracebacks of all ranks

The ranks run the checks in order and stop at the first that fails on any of them: what follows counts as not run. They
are forked from one server process that has imported everything (tests.distributed.imported): a start costs a second,
not the ten of the imports.
"""

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

Check = Callable[[Path], None]
"""Runs on every rank; takes the folder that was given to `launch`. A module's own function, or a partial of one."""

_LOG_CHARACTERS = 4000
_ROOT = str(Path(__file__).parents[2])
_CONTEXT = multiprocessing.get_context("forkserver")


def name_of(check: Check) -> str:
    """Name of a check, with the arguments of a partial."""
    if isinstance(check, functools.partial):
        arguments = (getattr(value, "__name__", str(value)) for value in (*check.args, *check.keywords.values()))
        return f"{check.func.__name__}({', '.join(arguments)})"
    return check.__name__


@dataclass(frozen=True, kw_only=True)
class Results:
    """What became of the checks of one start."""

    outcomes: list[dict[str, str]]
    """Per rank: check -> "" or its traceback."""
    end: str
    """How the start ended, for checks without an outcome."""

    def require(self, check: Check) -> None:
        """Fail the test unless the check passed on every rank."""
        name = name_of(check)
        failures = [f"rank {r}:\n{outcome[name]}" for r, outcome in enumerate(self.outcomes) if outcome.get(name)]
        missing = [r for r, outcome in enumerate(self.outcomes) if name not in outcome]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        if missing:
            pytest.fail(f"{name} has no outcome on ranks {missing}; {self.end}", pytrace=False)


def launch(checks: Sequence[Check], *, num_processes: int, folder: Path, timeout_s: float = 240.0) -> Results:
    """Start the ranks and wait for them.

    Args:
        checks: in the order they run.
        num_processes: world size.
        folder: for the checks' input and output; outcomes and output of the ranks are written to its ranks/.
        timeout_s: all ranks are killed after it.
    """
    ranks = folder / "ranks"
    ranks.mkdir(parents=True)
    _start_server()
    port = _free_port()
    processes = [
        _CONTEXT.Process(target=_run_rank, args=(list(checks), folder, rank, num_processes, port))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    running = list(processes)
    # One rank's failure ends all: the others would wait for it until their collectives time out.
    while running and time.monotonic() < deadline and all(p.exitcode in (None, 0) for p in processes):
        multiprocessing.connection.wait([p.sentinel for p in running], timeout=deadline - time.monotonic())
        running = [p for p in running if p.exitcode is None]
    timed_out = bool(running) and time.monotonic() >= deadline
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # the group: what a rank started lives on after it
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    finished = Finished(
        returncode=max((abs(p.exitcode or 0) for p in processes), default=0),
        output="\n".join(file.read_text(errors="replace") for file in sorted(ranks.glob("*.txt"))),
        timed_out=timed_out,
    )
    return Results(outcomes=[_read(ranks / f"{rank}.jsonl") for rank in range(num_processes)], end=finished.describe())


def _start_server() -> None:
    """Start the process that ranks are forked from, once a session."""
    before = dict(os.environ)
    # The server's environment is its ranks': it has to find the tests, whatever folder pytest was started in.
    os.environ |= {"PYTHONPATH": _ROOT, "OMP_NUM_THREADS": "1"}
    try:
        _CONTEXT.set_forkserver_preload(["tests.distributed.imported"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(checks: Sequence[Check], folder: Path, rank: int, num_processes: int, port: int) -> None:
    """Run the checks on this rank; exit code 1 at the first failure."""
    os.setsid()
    with (folder / "ranks" / f"{rank}.txt").open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from tests.distributed.imported import fork_checkpoint_queue

    fork_checkpoint_queue()
    with (folder / "ranks" / f"{rank}.jsonl").open("w") as outcomes:
        for check in checks:
            error = ""
            try:
                check(folder)
            except Exception:
                error = traceback.format_exc()
            outcomes.write(json.dumps({"check": name_of(check), "error": error}) + "\n")
            outcomes.flush()
            if error:
                sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A process group that has ended."""

    returncode: int
    output: str
    """stdout and stderr."""
    timed_out: bool

    def describe(self) -> str:
        """How it ended, with the end of its output."""
        how = "hung and was killed" if self.timed_out else f"ended with exit code {self.returncode}"
        return f"the start {how}; its last output:\n{self.output[-_LOG_CHARACTERS:]}"


def run_group(command: Sequence[str], *, timeout_s: float) -> Finished:
    """Run a command with all its descendants in one process group, which is killed as a whole at the time limit."""
    environment = os.environ | {"PYTHONPATH": _ROOT, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile(
        "w+", errors="replace"
    ) as output:  # a pipe would stay open as long as any descendant lives
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        with contextlib.suppress(
            ProcessLookupError
        ):  # what a killed process leaves behind: data workers, the save's manager
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return Finished(returncode=process.returncode, output=output.read(), timed_out=timed_out)


def _read(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["check"]: line["error"] for line in lines}
