"""Weights between Hugging Face folders and Megatron checkpoints.

python tools/convert.py import --llm Qwen3-8B-Base --vision siglip2-so400m-patch14-384 --out CKPT [model=qwen3_8b]
python tools/convert.py export --checkpoint CKPT --out HF_DIR [--part llm]
python tools/convert.py import --llm HF_DIR --vision HF_DIR --out CKPT      goes on from an export
python tools/convert.py verify --checkpoint CKPT --hf HF_DIR                under torchrun at any parallel= layout
"""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages, less time in page faults of large tensors
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def convert() -> None:
    """Weights between Hugging Face folders and Megatron checkpoints."""


@app.command("import")
def import_(
    llm: Annotated[Path, typer.Option(help="Qwen3 folder (config.json, safetensors, tokenizer) or an export.")],
    vision: Annotated[
        Path,
        typer.Option(help="SigLIP/SigLIP2 folder (config.json, safetensors, preprocessor_config.json) or an export."),
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the fresh resampler and projector.")] = 1234,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write what was done here.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="modality.image.resampler.num_tokens=128, ...; model=NAME checks the folder's size."),
    ] = None,
) -> None:
    """Hugging Face folders -> a checkpoint that loads at any layout.

    With a Qwen3 and a SigLIP folder, resampler and projector are fresh. With one of our own exports as both, everything
    comes from it.
    """
    from qwen3_vlm.convert.architecture import architecture_of
    from qwen3_vlm.convert.hf import import_hf
    from qwen3_vlm.convert.output import check_file

    check_file(json_file)
    decoder, modalities = architecture_of(llm, vision, overrides or [])
    report = import_hf(llm=llm, vision=vision, out=out, decoder=decoder, modalities=modalities, seed=seed)
    for folder, dropped in report.items():
        _print_dropped(folder, dropped)
    print(f"wrote {out}")
    if json_file is not None:
        json_file.write_text(json.dumps({"checkpoint": str(out), "dropped": report}, indent=1) + "\n")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="CKPT: import's --out, a saved step, or an exp_dir (its latest).")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    part: Annotated[
        Literal["all", "llm"], typer.Option(help="all: the whole model; llm: the decoder alone, as a plain Qwen3.")
    ] = "all",
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest safetensors file, in 10^9 bytes.")] = 5.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write what was done here.")] = None,
) -> None:
    """A checkpoint -> a folder for transformers: AutoModelForImageTextToText, or AutoModelForCausalLM (--part llm)."""
    from qwen3_vlm.convert.export import Part, export_hf
    from qwen3_vlm.convert.output import check_file

    check_file(json_file)
    dropped = export_hf(checkpoint=checkpoint, out=out, part=Part(part), max_shard_bytes=int(max_shard_gb * 10**9))
    _print_dropped(str(checkpoint), dropped)
    print(f"wrote {out}")
    if json_file is not None:
        json_file.write_text(json.dumps({"folder": str(out), "dropped": dropped}, indent=1) + "\n")


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Option(help="CKPT.")],
    hf: Annotated[Path, typer.Option(help="An exported folder; or a Qwen3 folder, for the decoder alone.")],
    tolerance: Annotated[float, typer.Option(help="Largest absolute difference of logits that passes.")] = 1e-4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the findings here.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="parallel=tp2, ...; FP32 unless precision=...")] = None,
) -> None:
    """Compare both sides: all tensors bit by bit, logits for text, one image and several; exit code 1 if they differ.

    Runs under torchrun at any layout.
    """
    from qwen3_vlm.convert.output import check_file
    from qwen3_vlm.eval import verify as verification

    check_file(json_file)
    found = verification.verify(checkpoint=checkpoint, hf=hf, tolerance=tolerance, overrides=overrides or [])
    if found is None:
        return
    print("\n".join(found.describe()))
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    if not found.passed:
        raise typer.Exit(1)


def _print_dropped(source: str, dropped: list[str]) -> None:
    print(f"{source}: {len(dropped)} parts are dropped by design" + (":" if dropped else ""))
    for name in dropped:
        print(f"  {name}")


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(app)
