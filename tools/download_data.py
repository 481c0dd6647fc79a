"""Fetch public data sets: with resume, checked for size (COCO: checksum), zips unpacked safely.

python tools/download_data.py llava-pretrain --out LLaVA-Pretrain --dry-run
python tools/download_data.py mantis --subsets nlvr2,birds-to-words --out Mantis-Instruct

HF_ENDPOINT and HF_TOKEN are huggingface_hub's. docs/data.md says what each set is and what comes next.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder to write; a half-done download in it is continued.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print files, sizes and licence; fetch nothing.")]
Include = Annotated[str, typer.Option(help="Comma-separated patterns of files instead of the usual ones.")]
Unpack = Annotated[bool, typer.Option(help="Unpack NAME.zip into NAME/ beside it; the zip stays.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write what was fetched here.")]


@app.callback()
def download_data() -> None:
    """Fetch public data sets."""


@app.command("llava-pretrain")
def llava_pretrain(
    out: Out, dry_run: DryRun = False, include: Include = "", unpack: Unpack = True, json_file: JsonFile = None
) -> None:
    """LLaVA-Pretrain: 558K captions and images.zip (research use only)."""
    _hub("llava-pretrain", out, dry_run, include, "", unpack, json_file)


@app.command("llava-instruct")
def llava_instruct(
    out: Out, dry_run: DryRun = False, include: Include = "", unpack: Unpack = True, json_file: JsonFile = None
) -> None:
    """LLaVA-Instruct-150K: conversations on COCO images; --include llava_v1_5_mix665k.json for the 665K mix."""
    _hub("llava-instruct", out, dry_run, include, "", unpack, json_file)


@app.command("mantis")
def mantis(
    out: Out,
    subsets: Annotated[str, typer.Option(help="Comma-separated folders, such as nlvr2,dreamsim; all if empty.")] = "",
    dry_run: DryRun = False,
    include: Include = "",
    unpack: Unpack = True,
    json_file: JsonFile = None,
) -> None:
    """Mantis-Instruct: parquet and train_images.zip of each subset; none of its loader's code is run."""
    _hub("mantis", out, dry_run, include, subsets, unpack, json_file)


@app.command("coco2017")
def coco2017(
    out: Out,
    dry_run: DryRun = False,
    url: Annotated[str, typer.Option(help="A mirror of train2017.zip; size and checksum stay those of COCO.")] = "",
    unpack: Unpack = True,
    json_file: JsonFile = None,
) -> None:
    """COCO train2017: 118,287 images, 18 GiB."""
    from qwen3_vlm.data import download

    file = replace(download.COCO, url=url or download.COCO.url)
    remote = download.RemoteFile(name=file.name, size=file.size)
    plan = download.Download(source=file.url, licence=file.licence, files=[remote])
    _show(plan)
    if not dry_run:
        plan = download.fetch_file(file, out, unpack=unpack)
    _finish(plan, json_file)


def _hub(name: str, out: Path, dry_run: bool, include: str, subsets: str, unpack: bool, json_file: Path | None) -> None:
    from qwen3_vlm.data import download

    plan = download.plan_hub(name, include=_words(include), subsets=_words(subsets))
    _show(plan)
    if not dry_run:
        plan = download.fetch_hub(plan, out, unpack=unpack)
    _finish(plan, json_file)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _show(plan: Any) -> None:
    for file in plan.files:
        print(f"{file.size:>16,}  {file.name}")
    print(f"{plan.bytes:>16,}  bytes in {len(plan.files)} files of {plan.source}")
    print(f"licence: {plan.licence}")


def _finish(plan: Any, json_file: Path | None) -> None:
    for unpacked in plan.unpacked:
        print(f"{unpacked.archive}: {unpacked.files} files unpacked, refused: {unpacked.refused or 'none'}")
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(plan), indent=1) + "\n")


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(app)
