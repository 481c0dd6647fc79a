"""Measurements as JSON.

python tools/benchmark.py convert --out convert.json [--model qwen3_8b] [--scratch DIR]
python tools/benchmark.py data --out data.json [--rows 558000] [--scratch DIR]
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Out = Annotated[Path, typer.Option(help="JSON file to write.")]
Scratch = Annotated[Path | None, typer.Option(help="Where to put what is measured; default: a temporary folder.")]


@app.callback()
def benchmark() -> None:
    """Measurements as JSON."""


@app.command()
def convert(
    out: Out,
    model: Annotated[str, typer.Option(help="A size of conf/model.")] = "qwen3_8b",
    modality: Annotated[str, typer.Option(help="A tower of conf/modality.")] = "siglip2_so400m_384",
    scratch: Scratch = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 1234,
) -> None:
    """Time and peak memory of import and export against a plain copy, and whether every bit came through."""
    from benchmarks.convert import measure

    with tempfile.TemporaryDirectory(dir=scratch, prefix="convert_benchmark_") as name:
        result = measure(Path(name), model, modality, seed)
    _write(out, result)
    if not result["bit_exact"]:
        raise SystemExit(1)


@app.command()
def data(
    out: Out,
    rows: Annotated[int, typer.Option(min=1, help="Samples of the data set that is streamed.")] = 558_000,
    images: Annotated[int, typer.Option(min=8, help="Image files that are decoded.")] = 400,
    scratch: Scratch = None,
    seed: Annotated[int, typer.Option(help="Of lengths and pictures.")] = 1234,
) -> None:
    """Fill of the rows, balance of the ranks, images a second, time to the first batch, memory of a worker."""
    from benchmarks.data import measure

    with tempfile.TemporaryDirectory(dir=scratch, prefix="data_benchmark_") as name:
        _write(out, measure(Path(name), rows, images, seed))


def _write(out: Path, result: dict[str, Any]) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out.read_text(), end="")


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(app)
