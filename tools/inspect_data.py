"""One HTML page of what the model will see: packed rows, loss tokens, decoded text, images at their placeholders.

python tools/inspect_data.py --data data/llava --checkpoint ckpt/import --out report.html
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def main(
    data: Annotated[Path, typer.Option(help="A prepared folder or a metadataset YAML.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Whose tokenizer and image size; else --tokenizer with the conf's defaults.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a Qwen3 tokenizer, if there is no checkpoint yet.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of a row (train.seq_length).")] = 4096,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are drawn.")] = 4,
    counted: Annotated[int, typer.Option(min=1, help="Rows that are read for the figures.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the order (train.seed).")] = 1234,
    max_items_per_row: Annotated[int | None, typer.Option(min=1, help="As data.max_items_per_row.")] = None,
    bucket_by_items: Annotated[bool, typer.Option(help="As data.bucket_by_items.")] = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Draw the first rows of the first pass, as a run with this seed and sequence length makes them."""
    from qwen3_vlm.checkpoint import layout
    from qwen3_vlm.config.compose import compose
    from qwen3_vlm.config.schema import DataConfig
    from qwen3_vlm.data.inspect import inspection_page
    from qwen3_vlm.data.loader import RowLoader
    from qwen3_vlm.data.tokenizer import ChatTokenizer
    from qwen3_vlm.errors import ConfigError
    from qwen3_vlm.modality.registry import build_modalities

    if (checkpoint is None) == (tokenizer is None):
        raise ConfigError("give either --checkpoint or --tokenizer: the text has to be encoded by some tokenizer")
    if checkpoint is not None:
        modalities = build_modalities(layout.read_architecture(checkpoint).modality)
        tokenizer = layout.resolve(checkpoint) / layout.PROCESSOR
    else:
        conf = compose("stage1_align", ["exp_dir=unused", f"data.path={data}", f"train.seq_length={seq_length}"])
        modalities = build_modalities(conf.modality)
    assert tokenizer is not None
    chat_tokenizer = ChatTokenizer.from_folder(tokenizer, modalities)
    loader = RowLoader(
        DataConfig(
            path=str(data),
            num_workers=num_workers,
            max_items_per_row=max_items_per_row,
            bucket_by_items=bucket_by_items,
        ),
        seq_length=seq_length,
        modalities=modalities,
        tokenizer=chat_tokenizer,
        seed=seed,
        split=split,
    )
    read = []
    while len(read) < max(rows, counted) and (step := loader.next_rows()) is not None:
        read += step
    loader.close()
    title = f"{data}: {split}, rows of {seq_length} tokens"
    page, figures = inspection_page(title, read, chat_tokenizer, modalities, shown=rows)
    out.write_text(page)
    whole_pass = {"samples": loader.samples_per_pass, "rows": loader.rows_per_pass, "fill": round(loader.fill, 4)}
    report = {"read": asdict(figures), "pass": whole_pass}
    print(json.dumps(report, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(main)
