"""Prepare public data sets for training: check the rows, split off validation, write what the loader streams.

python tools/prepare_data.py llava-pretrain --source blip_laion_cc_sbu_558k.json --images images/ --out data/llava
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def prepare_data() -> None:
    """Prepare public data sets for training."""


@app.command("llava-pretrain")
def llava_pretrain(
    source: Annotated[Path, typer.Option(help="JSON or JSONL file of LLaVA's form, or the folder that holds it.")],
    images: Annotated[Path, typer.Option(help="Folder that image names are relative to.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    val_fraction: Annotated[float, typer.Option(help="Share of rows for validation, in [0, 1).")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first so many rows only.")] = None,
) -> None:
    """LLaVA-form JSON: {id, image, conversations: [{from, value}]}; nothing is copied. Prints OUT/report.json."""
    from qwen3_vlm.data.prepare import prepare_llava

    print(json.dumps(asdict(prepare_llava(source, images, out, val_fraction=val_fraction, limit=limit)), indent=2))


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(app)
