"""Find where two runs part: the first step and key of metrics.jsonl, then the first saved step and its tensors.

    python tools/compare_runs.py runs/a runs/b --tolerance 1e-5

Exit code 0 if they agree, 1 if they differ. docs/comparing-runs.md says how to read the answer.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def main(
    a: Annotated[Path, typer.Argument(help="exp_dir of the reference.")],
    b: Annotated[Path, typer.Argument(help="exp_dir of the other run.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative difference that counts as equal; 0: equal bits.")
    ] = 0,
    shown: Annotated[int, typer.Option(min=1, help="Tensors shown.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all differences here.")] = None,
) -> None:
    """Compare two runs."""
    from qwen3_vlm.checkpoint import compare, layout

    metric = compare.first_metric_difference(a, b, tolerance)
    print("metrics agree" if metric is None else f"step {metric.step}: {metric.key} is {metric.a} and {metric.b}")
    tensors: list[compare.TensorDifference] = []
    step = None
    for step in compare.common_steps(a, b):
        states = [layout.step_dir(run, step) / layout.STATE for run in (a, b)]
        tensors = compare.tensor_differences(*states, tolerance)
        print(f"saved step {step}: " + (f"{len(tensors)} tensors differ" if tensors else "all tensors agree"))
        if tensors:
            break
    for d in sorted(tensors, key=lambda d: -d.relative)[:shown]:
        print(f"  {d.relative:.3e} relative, {d.largest:.3e} largest  {d.name}")
    if step is None:
        print("no saved step in common: set checkpoint.save_every and checkpoint.keep to compare tensors")
    if json_file is not None:
        report = {
            "metrics": None if metric is None else asdict(metric),
            "step": step,
            "tensors": [asdict(d) for d in tensors],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    raise typer.Exit(1 if metric is not None or tensors else 0)


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(main)
