"""Score a checkpoint on held-out questions; under torchrun at any parallel= layout.

python tools/evaluate.py --checkpoint CKPT --suite heldout.jsonl --out report.html --json report.json
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def main(
    checkpoint: Annotated[str, typer.Option(help="Import's --out, a saved step, or an exp_dir.")],
    suite: Annotated[Path, typer.Option(help='JSONL: {"images": [...], "question": ..., "answer": ...} a line.')],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write scores and answers here.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    shown: Annotated[int, typer.Option(help="Questions shown on the page.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the control with shuffled images.")] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(help="parallel=tp2, precision=bf16, ...")] = None,
) -> None:
    """Exact match, the control with shuffled images, and the best constant answer."""
    from qwen3_vlm.eval.session import open_session

    with open_session(checkpoint, overrides or []) as session:
        from qwen3_vlm.eval.exact_match import evaluate, read_suite
        from qwen3_vlm.eval.report import evaluation_page

        score, answered = evaluate(session.generator, read_suite(suite), max_new_tokens=max_new_tokens, seed=seed)
        if session.topology.rank != 0:
            return
        out.write_text(evaluation_page(f"{checkpoint} on {suite}", score, answered[:shown]))
        if json_file is not None:
            rows = [
                {
                    "images": [str(p) for p in a.question.images],
                    "question": a.question.question,
                    "answer": a.question.answer,
                    "said": a.said,
                    "said_with_other_images": a.said_with_other_images,
                }
                for a in answered
            ]
            json_file.write_text(json.dumps({"score": asdict(score), "answers": rows}, indent=1) + "\n")
        print(json.dumps(asdict(score)))


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(main)
