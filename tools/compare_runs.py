"""Find where two runs part: the first step and key of metrics.jsonl, then the first saved step and what differs in it.

    python tools/compare_runs.py runs/a runs/b --tolerance 1e-5

Exit code 0 if all steps that both have agree, 1 if one differs. docs/comparing-runs.md says how to read the answer.
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
        float, typer.Option(min=0, help="Relative difference that counts as equal; 0: equal values.")
    ] = 0,
    shown: Annotated[int, typer.Option(min=1, help="Tensors, and other values, shown.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all differences here.")] = None,
) -> None:
    """Compare two runs."""
    from qwen3_vlm.checkpoint import compare, layout

    metric = compare.first_metric_difference(a, b, tolerance)
    steps = [set(compare.read_metrics(run)) for run in (a, b)]
    if metric is None:
        print(f"metrics agree in {len(steps[0] & steps[1])} steps")
    else:
        print(f"step {metric.step}: {metric.key} is {metric.a} and {metric.b}")
    if steps[0] != steps[1]:
        counts = [f"{run} has {len(held)} steps, the last {max(held)}" for run, held in zip((a, b), steps, strict=True)]
        print(f"not all steps are in both: {'; '.join(counts)}")
    tensors: list[compare.TensorDifference] = []
    objects: list[compare.ObjectDifference] = []
    step = None
    for step in compare.common_steps(a, b):
        saved = [layout.step_dir(run, step) for run in (a, b)]
        states = [folder / layout.STATE for folder in saved]
        tensors = compare.tensor_differences(*states, tolerance, vocab_size=compare.common_vocab_size(*saved))
        objects = compare.object_differences(*states, tolerance)
        print(f"saved step {step}: " + (f"{len(tensors)} tensors differ" if tensors else "all tensors agree"))
        if objects:
            print(f"saved step {step}: {len(objects)} values beside the tensors differ")
        if tensors or objects:
            break
    for d in sorted(tensors, key=lambda d: -d.relative)[:shown]:
        print(f"  {d.relative:.3e} relative, {d.largest:.3e} largest  {d.name}")
    for o in objects[:shown]:
        print(f"  {o.name} is {o.a} and {o.b}")
    if step is None:
        print("no saved step in common: set checkpoint.save_every and checkpoint.keep to compare tensors")
    if json_file is not None:
        report = {
            "metrics": None if metric is None else asdict(metric),
            "metric_steps": [len(held) for held in steps],
            "step": step,
            "tensors": [asdict(d) for d in tensors],
            "objects": [asdict(o) for o in objects],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    raise typer.Exit(1 if metric is not None or tensors or objects else 0)


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(main)
