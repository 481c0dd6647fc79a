"""Folder layout of checkpoints, the atomic "latest" mark, and pruning.

CKPT/                          one checkpoint: what convert.py import writes, and one saved step
  qwen3_vlm.json               the manifest, written last: a folder without it is incomplete
  state/                       megatron-core distributed checkpoint (model; optimizer and scheduler of a run)
  processor/                   tokenizer files and preprocessor_config.json, as Hugging Face names them
  history.json                 the trainings before this one, a line each; absent if there were none
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
from qwen3_vlm.errors import CheckpointError, ConfigError

FORMAT_VERSION = 1
MANIFEST = "qwen3_vlm.json"
STATE = "state"
PROCESSOR = "processor"
LATEST = "latest"
HISTORY = "history.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
_TRAINING = {
    "trained": list,
    "steps": int,
    "rows": int,
    "seq_length": int,
    "samples": int,
    "lr": float,
    "precision": str,
    "data": str,
}
"""Keys of a line of history.json."""
_STATE_FILES = (".metadata", ".metadata.tmp", "common.pt", "metadata.json")
"""What a state folder holds beside its .distcp files."""


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
    except ValueError as e:  # no JSON, or no UTF-8
        raise CheckpointError(f"{path} is not JSON ({e}): the checkpoint is damaged, use another one") from e
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}, this version ({qwen3_vlm.__version__}) reads format "
            f"{FORMAT_VERSION}. Use the version that wrote it "
            f"({fields.get('code_version') if isinstance(fields, dict) else None!r}), "
            "or import the weights again with tools/convert.py import."
        )
    try:
        manifest = Manifest(**fields)
    except TypeError as e:
        raise CheckpointError(f"{path} is no manifest ({e}): the checkpoint is damaged, use another one") from e
    wrong = [name for name in ("config", "progress") if not isinstance(fields[name], dict)]
    if wrong or not isinstance(manifest.step, int):
        raise CheckpointError(f"{path}: {wrong or 'step'} has another type: the checkpoint is damaged, use another one")
    return manifest


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
        CheckpointError: there is no checkpoint, its format is unknown, or it describes no model.
    """
    directory = resolve(path)
    config = read_manifest(directory).config
    try:
        return Architecture(
            model=decoder_from_dict(config["model"]),
            modality=modality_from_dict(config["modality"]),
        )
    except (KeyError, TypeError, AttributeError, ConfigError) as e:
        raise CheckpointError(
            f"{directory / MANIFEST} does not describe model and modality ({e!r}): the checkpoint is damaged, use "
            "another one"
        ) from e


def start(checkpoint: Path, *, replace: bool = False) -> None:
    """Make an empty folder for a checkpoint, removing what an interrupted save left there.

    Args:
        checkpoint: the folder.
        replace: also remove a complete checkpoint: a run killed before `latest` named it saves the step again.

    Raises:
        CheckpointError: a complete checkpoint (unless it may be replaced) or something else stands there already.
    """
    if (checkpoint / MANIFEST).exists() and not replace:
        raise CheckpointError(f"{checkpoint} already holds a complete checkpoint: choose another folder or remove it")
    if checkpoint.exists() and not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is a file: choose another folder")
    strange = _strange(checkpoint)
    if strange:
        raise CheckpointError(
            f"{checkpoint} is not empty and not ours (it holds {strange[:5]}): choose another folder or remove them"
        )
    try:
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        for name in (f"{MANIFEST}.tmp", HISTORY):
            (checkpoint / name).unlink(missing_ok=True)
        for name in (STATE, PROCESSOR):
            if (checkpoint / name).exists():
                shutil.rmtree(checkpoint / name)
        (checkpoint / STATE).mkdir(parents=True)
    except OSError as e:
        raise CheckpointError(f"{checkpoint} cannot be made: {e.strerror}. Choose another folder") from e


def _strange(checkpoint: Path) -> list[str]:
    """What a folder holds that no import and no save writes, by its path in the folder."""
    known = {MANIFEST, f"{MANIFEST}.tmp", HISTORY}

    def ours(path: Path) -> bool:
        within = path.relative_to(checkpoint).parts
        if path.is_symlink() or path.is_dir():
            return within in ((STATE,), (PROCESSOR,)) and not path.is_symlink()
        if len(within) == 1:
            return path.name in known
        if within[0] == STATE:
            return path.suffix == ".distcp" or path.name in _STATE_FILES
        return path.name in (*TOKENIZER_FILES, IMAGE_PROCESSOR_FILE)

    return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if not ours(p))


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
    """Carry tokenizer and image-processor files, and the history of the weights, from one checkpoint to another.

    A source of another run (or an import) ends with a training of its own: that becomes a line of the history.
    """
    shutil.copytree(source / PROCESSOR, target / PROCESSOR, dirs_exist_ok=True)
    same_run = source.resolve().parent == target.resolve().parent
    write_history(target, read_history(source) if same_run else trainings(source))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The trainings that a checkpoint or an export started from, oldest first; none if nothing is recorded.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / HISTORY
    if not path.is_file():
        return []
    try:
        history = json.loads(path.read_text())
        for one in history:
            kinds = {key: type(value) for key, value in one.items()}
            if kinds != _TRAINING or not all(isinstance(part, str) for part in one["trained"]):
                raise ValueError(f"it holds {one}, expected {', '.join(_TRAINING)}")
    except (ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} is no history ({e}): remove it, the model card then says nothing of it") from e
    return history


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Keep the trainings that a checkpoint started from; no file without any."""
    if history:
        _replace_text(folder / HISTORY, json.dumps(history, indent=1) + "\n")


def trainings(checkpoint: Path) -> list[dict[str, Any]]:
    """Every training that made a checkpoint, its own last; paths are cut to their last part.

    Raises:
        CheckpointError: its manifest or its history is damaged.
    """
    manifest, history = read_manifest(checkpoint), read_history(checkpoint)
    if not manifest.step:
        return history
    try:
        train, config = manifest.config["train"], manifest.config
        own = {
            "trained": list(train["trainable"]),
            "steps": manifest.step,
            "rows": train["global_batch_size"],
            "seq_length": train["seq_length"],
            "samples": manifest.progress["samples"],
            "lr": float(config["optim"]["lr"]),
            "precision": config["precision"]["name"],
            "data": Path(config["data"]["path"]).name,
        }
    except (KeyError, TypeError) as e:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} does not describe the run that saved it ({e!r}): the checkpoint is damaged, use "
            "another one"
        ) from e
    return [*history, own]
