"""How commands start and end: an expected error is one line on stderr and exit code 1, never a traceback."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from qwen3_vlm.errors import Qwen3VLMError
from qwen3_vlm.logging import quiet_libraries


def run(command: Callable[..., Any] | typer.Typer) -> None:
    """Run a typer command or app.

    Raises:
        SystemExit: always; 0 if the command succeeded, 1 for an expected error, 2 for wrong usage.
    """
    quiet_libraries()
    app = command if isinstance(command, typer.Typer) else _single(command)
    try:
        app()
    except Qwen3VLMError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None


def _single(command: Callable[..., Any]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app
