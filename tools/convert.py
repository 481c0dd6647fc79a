"""Weights between Hugging Face folders and Megatron checkpoints.

python tools/convert.py import --llm Qwen3-8B-Base --vision siglip2-so400m-patch14-384 --out CKPT [model=qwen3_8b]
"""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def convert() -> None:
    """Weights between Hugging Face folders and Megatron checkpoints."""


@app.command("import")
def import_(
    llm: Annotated[Path, typer.Option(help="Qwen3 folder: config.json, safetensors, tokenizer.")],
    vision: Annotated[
        Path, typer.Option(help="SigLIP/SigLIP2 folder: config.json, safetensors, preprocessor_config.json.")
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the fresh resampler and projector.")] = 1234,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write what was done here.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="modality.image.resampler.num_tokens=128, ...; model=NAME checks the folder's size."),
    ] = None,
) -> None:
    """Hugging Face folders -> a checkpoint that loads at any layout, with a fresh resampler and projector."""
    from qwen3_vlm.config.schema import ParallelConfig
    from qwen3_vlm.parallel import topology

    topology.initialize(ParallelConfig(), seed=seed)
    try:
        from qwen3_vlm.convert.architecture import architecture_of
        from qwen3_vlm.convert.hf import import_hf

        decoder, modalities = architecture_of(llm, vision, overrides or [])
        report = import_hf(llm=llm, vision=vision, out=out, decoder=decoder, modalities=modalities, seed=seed)
    finally:
        topology.shutdown()
    for folder, dropped in report.items():
        print(f"{folder}: {len(dropped)} tensors are dropped by design" + (":" if dropped else ""))
        for name in dropped:
            print(f"  {name}")
    print(f"wrote {out}")
    if json_file is not None:
        json_file.write_text(json.dumps({"checkpoint": str(out), "dropped": report}, indent=1) + "\n")


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(app)
