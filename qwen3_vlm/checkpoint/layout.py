"""Folder layout of checkpoints, the atomic "latest" mark, and pruning.

CKPT/                          one checkpoint: what convert.py import writes, and one saved step
  qwen3_vlm.json               the manifest, written last: a folder without it is incomplete
  state/                       megatron-core distributed checkpoint (model; optimizer and scheduler of a run)
  processor/                   tokenizer files and preprocessor_config.json, as Hugging Face names them
EXP_DIR/checkpoints/
  step_00000100/               a CKPT
  latest                       name of the newest complete step, replaced in one move
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qwen3_vlm
from qwen3_vlm.config.compose import decoder_from_dict, modality_from_dict
from qwen3_vlm.config.schema import DecoderConfig, ModalityConfig
from qwen3_vlm.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "qwen3_vlm.json"
STATE = "state"
PROCESSOR = "processor"
LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Optimizer steps done; 0 for an import."""
    config: dict[str, Any]
    """model and modality (an import), or the run's whole resolved configuration (a saved step)."""
    progress: dict[str, Any]
    """Counters, layout and data position of the run; empty for an import."""
    format_version: int = FORMAT_VERSION
    code_version: str = qwen3_vlm.__version__


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model that a checkpoint holds."""

    model: DecoderConfig
    modality: dict[str, ModalityConfig]


def _replace_text(path: Path, text: str) -> None:
    """Write a small file in one move: readers see the old or the new text, never half."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Mark a checkpoint as complete; the last thing that is written into it."""
    _replace_text(checkpoint / MANIFEST, json.dumps(vars(manifest), indent=1) + "\n")


def read_manifest(checkpoint: Path) -> Manifest:
    """Read what a checkpoint says of itself.

    Raises:
        CheckpointError: no manifest, unreadable JSON, or a format that this version does not know.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {MANIFEST}: it is not a checkpoint or was never completed. Give the --out of "
            "tools/convert.py import, a saved step, or an exp_dir."
        )
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise CheckpointError(f"{path} is not JSON ({e}): the checkpoint is damaged, use another one") from e
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}, this version ({qwen3_vlm.__version__}) reads format "
            f"{FORMAT_VERSION}. Use the version that wrote it "
            f"({fields.get('code_version') if isinstance(fields, dict) else None!r}), "
            "or import the weights again with tools/convert.py import."
        )
    return Manifest(**fields)


def checkpoints_dir(exp_dir: Path) -> Path:
    """Where a run keeps its saved steps."""
    return exp_dir / "checkpoints"


def step_dir(exp_dir: Path, step: int) -> Path:
    """Folder of one saved step."""
    return checkpoints_dir(exp_dir) / f"step_{step:08d}"


def latest_step_dir(exp_dir: Path) -> Path | None:
    """The newest complete step of a run, or None.

    Raises:
        CheckpointError: the mark names a step that is missing.
    """
    mark = checkpoints_dir(exp_dir) / LATEST
    if not mark.is_file():
        return None
    name = mark.read_text().strip()
    step = checkpoints_dir(exp_dir) / name
    if Path(name).name != name or not (step / MANIFEST).is_file():
        raise CheckpointError(
            f"{mark} names {name!r}, which is not a complete step of {exp_dir}: correct or remove the mark"
        )
    return step


def resolve(path: str | Path) -> Path:
    """CKPT as users name it -> the folder of one checkpoint: import's --out, a saved step, or an exp_dir (its latest).

    Raises:
        CheckpointError: there is no checkpoint.
    """
    given = Path(path)
    if (given / MANIFEST).is_file():
        return given
    latest = latest_step_dir(given)
    if latest is None:
        raise CheckpointError(
            f"{given} holds no checkpoint: neither {MANIFEST} nor checkpoints/{LATEST} is there. Give the --out of "
            "tools/convert.py import, a saved step, or an exp_dir with at least one save."
        )
    return latest


def read_architecture(path: str | Path) -> Architecture:
    """Decoder and modalities of CKPT.

    Raises:
        CheckpointError: there is no checkpoint, or its format is unknown.
    """
    config = read_manifest(resolve(path)).config
    return Architecture(
        model=decoder_from_dict(config["model"]),
        modality=modality_from_dict(config["modality"]),
    )


def start(checkpoint: Path, *, replace: bool = False) -> None:
    """Make an empty folder for a checkpoint, removing what an interrupted save left there.

    Args:
        checkpoint: the folder.
        replace: also remove a complete checkpoint: a run killed before `latest` named it saves the step again.

    Raises:
        CheckpointError: a complete checkpoint (unless it may be replaced) or something else stands there already.
    """
    if (checkpoint / MANIFEST).exists():
        if not replace:
            raise CheckpointError(
                f"{checkpoint} already holds a complete checkpoint: choose another folder or remove it"
            )
        (checkpoint / MANIFEST).unlink()
    known = {STATE, PROCESSOR, f"{MANIFEST}.tmp"}
    if checkpoint.is_dir():
        strange = sorted(p.name for p in checkpoint.iterdir() if p.name not in known)
        if strange:
            raise CheckpointError(
                f"{checkpoint} is not empty and not ours (it holds {strange[:5]}): choose another folder"
            )
        shutil.rmtree(checkpoint)
    (checkpoint / STATE).mkdir(parents=True)


def mark_latest(exp_dir: Path, step: int) -> None:
    """Let `latest` name this step, in one move."""
    _replace_text(checkpoints_dir(exp_dir) / LATEST, step_dir(exp_dir, step).name + "\n")


def prune(exp_dir: Path, keep: int) -> list[Path]:
    """Remove all complete steps but the newest `keep`; returns what was removed. The step that `latest` names always
    stays.
    """
    latest = latest_step_dir(exp_dir)
    complete = sorted(p.parent for p in checkpoints_dir(exp_dir).glob(f"step_*/{MANIFEST}"))
    removed = [p for p in complete[: max(0, len(complete) - keep)] if p != latest]
    for path in removed:
        (path / MANIFEST).unlink()  # from here on it does not look complete
        shutil.rmtree(path)
    return removed


def copy_processor(source: Path, target: Path) -> None:
    """Carry tokenizer and image-processor files from one checkpoint to another."""
    shutil.copytree(source / PROCESSOR, target / PROCESSOR, dirs_exist_ok=True)
