"""Run functions in n gloo processes: one torchrun start for a whole list of checks, with a time limit.

    results = launch([check_logits, check_shapes], num_processes=2, folder=tmp_path)
    results.require(check_logits)      # fails with the tracebacks of all ranks

A start costs about ten seconds of imports, so a test module makes one and asks for each check by name. The ranks run
the checks in order and stop at the first that fails on any of them: what follows counts as not run.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

Check = Callable[[Path], None]
"""Runs on every rank; takes the folder that was given to `launch`. Must be a module's own function."""

_LOG_CHARACTERS = 4000


@dataclass(frozen=True, kw_only=True)
class Results:
    """What became of the checks of one start."""

    outcomes: list[dict[str, str]]
    """Per rank: check -> "" or its traceback."""
    end: str
    """How the start ended, for checks without an outcome."""

    def require(self, check: Check) -> None:
        """Fail the test unless the check passed on every rank."""
        name = check.__name__
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
        folder: for the checks' input and output; outcomes are written to its ranks/.
        timeout_s: all ranks are killed after it.
    """
    outcomes = folder / "ranks"
    outcomes.mkdir()
    names = [f"{check.__module__}:{check.__name__}" for check in checks]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", __name__, str(folder), *names]
    done = run_group(command, timeout_s=timeout_s)
    (folder / "output.txt").write_text(done.output)
    return Results(outcomes=[_read(outcomes / f"{rank}.jsonl") for rank in range(num_processes)], end=done.describe())


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
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
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


def _run_rank(folder: Path, names: Sequence[str]) -> int:
    """Run the checks on this rank; 1 at the first failure, so that torchrun ends the other ranks too."""
    with (folder / "ranks" / f"{os.environ['RANK']}.jsonl").open("w") as outcomes:
        for name in names:
            module, function = name.split(":")
            error = ""
            try:
                getattr(importlib.import_module(module), function)(folder)
            except Exception:
                error = traceback.format_exc()
            outcomes.write(json.dumps({"check": function, "error": error}) + "\n")
            outcomes.flush()
            if error:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(_run_rank(Path(sys.argv[1]), sys.argv[2:]))
