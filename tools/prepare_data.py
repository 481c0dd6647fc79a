"""Prepare public data sets for training: check the rows, split off validation, write what the loader streams.

python tools/prepare_data.py llava-pretrain --source blip_laion_cc_sbu_558k.json --images images/ --out data/llava
python tools/prepare_data.py llava-instruct --source llava_instruct_150k.json --images train2017/ --out data/instruct
python tools/prepare_data.py mantis --source Mantis-Instruct/ --images Mantis-Instruct/ --out data/mantis

docs/data.md says what each reads, writes and drops.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

Source = Annotated[Path, typer.Option(help="JSON or JSONL file of LLaVA's form, or the folder that holds it.")]
Images = Annotated[Path, typer.Option(help="Folder that image names are relative to, or a zip of it.")]
Out = Annotated[Path, typer.Option(help="Folder to write; an unfinished preparation in it is continued.")]
ValFraction = Annotated[float, typer.Option(help="Share of rows for validation, in [0, 1), chosen by key.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read the first so many rows only.")]
FormName = Annotated[
    str, typer.Option("--form", help="jsonl: images stay where they are; tar: copied into tar shards.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Worker processes; the result does not depend on them.")]
Repair = Annotated[
    bool, typer.Option(help="Add or remove <image> where text and images disagree in number; else such rows drop.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Measure lengths in tokens of this checkpoint's tokenizer.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report here.")]

JOBS = min(8, len(os.sched_getaffinity(0)))


@app.callback()
def prepare_data() -> None:
    """Prepare public data sets for training."""


@app.command("llava-pretrain")
def llava_pretrain(
    source: Source,
    images: Images,
    out: Out,
    val_fraction: ValFraction = 0.0,
    limit: Limit = None,
    form: FormName = "jsonl",
    jobs: Jobs = JOBS,
    repair_placeholders: Repair = False,
    checkpoint: Checkpoint = None,
    json_file: JsonFile = None,
) -> None:
    """LLaVA-Pretrain: {id, image, conversations: [{from, value}]}. Prints OUT/report.json."""
    from qwen3_vlm.data.prepare import prepare_llava

    options = _options(val_fraction, limit, form, jobs, repair_placeholders, checkpoint)
    _finish(prepare_llava, source, images, out, options, json_file)


@app.command("llava-instruct")
def llava_instruct(
    source: Source,
    images: Images,
    out: Out,
    val_fraction: ValFraction = 0.0,
    limit: Limit = None,
    form: FormName = "jsonl",
    jobs: Jobs = JOBS,
    repair_placeholders: Repair = False,
    checkpoint: Checkpoint = None,
    json_file: JsonFile = None,
) -> None:
    """LLaVA-Instruct-150K (images: COCO train2017) or the 665K mix (images: the folder that holds coco/, gqa/, ...)."""
    from qwen3_vlm.data.prepare import prepare_llava

    options = _options(val_fraction, limit, form, jobs, repair_placeholders, checkpoint)
    _finish(prepare_llava, source, images, out, options, json_file)


@app.command("mantis")
def mantis(
    source: Annotated[Path, typer.Option(help="Folder that holds SUBSET/*.parquet.")],
    images: Annotated[Path, typer.Option(help="Folder that holds SUBSET/train_images or SUBSET/train_images.zip.")],
    out: Out,
    val_fraction: ValFraction = 0.0,
    limit: Limit = None,
    form: FormName = "jsonl",
    jobs: Jobs = JOBS,
    repair_placeholders: Repair = False,
    checkpoint: Checkpoint = None,
    json_file: JsonFile = None,
) -> None:
    """Mantis-Instruct: images by path, in zips, or inline. Prints OUT/report.json."""
    from qwen3_vlm.data.prepare import prepare_mantis

    options = _options(val_fraction, limit, form, jobs, repair_placeholders, checkpoint)
    _finish(prepare_mantis, source, images, out, options, json_file)


def _options(
    val_fraction: float, limit: int | None, form: str, jobs: int, repair: bool, checkpoint: Path | None
) -> Any:
    from qwen3_vlm.data.prepare import Form, Options
    from qwen3_vlm.errors import DataError

    if form not in list(Form):
        raise DataError(f"--form is {form!r}, expected one of {', '.join(Form)}")
    measure, measured_by = _measure(checkpoint) if checkpoint else (None, "characters")
    return Options(
        val_fraction=val_fraction,
        limit=limit,
        form=Form(form),
        jobs=jobs,
        repair_placeholders=repair,
        measure=measure,
        measured_by=measured_by,
    )


def _measure(checkpoint: Path) -> tuple[Callable[..., int], str]:
    from qwen3_vlm.checkpoint import layout
    from qwen3_vlm.data.chat import ChatEncoder
    from qwen3_vlm.data.sample import Message
    from qwen3_vlm.data.tokenizer import ChatTokenizer
    from qwen3_vlm.modality.registry import build_modalities

    modalities = build_modalities(layout.read_architecture(checkpoint).modality)
    tokenizer = ChatTokenizer.from_folder(layout.resolve(checkpoint) / layout.PROCESSOR, modalities)
    encoder = ChatEncoder(tokenizer, modalities)
    tokens_per_item = {name: modality.num_tokens for name, modality in modalities.items()}

    def measure(messages: list[dict[str, str]], num_images: int) -> int:
        return encoder.encode_conversation([Message(**m) for m in messages], {"image": num_images}).input_ids.numel()

    return measure, f"{tokenizer.fingerprint} {tokens_per_item}"


def _finish(
    prepare: Callable[..., Any], source: Path, images: Path, out: Path, options: Any, file: Path | None
) -> None:
    text = json.dumps(asdict(prepare(source, images, out, options)), indent=2)
    print(text)
    if file is not None:
        file.write_text(text + "\n")


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(app)
