"""Folders of checkpoints: what counts as one, what is refused and with what advice, what is removed."""

import json
from pathlib import Path

import pytest

from qwen3_vlm.checkpoint import layout
from qwen3_vlm.config.schema import DecoderConfig
from qwen3_vlm.config.tree import to_dict
from qwen3_vlm.errors import CheckpointError
from tests.unit.model.builders import DECODER, IMAGE


def complete(folder: Path, step: int = 0) -> Path:
    layout.start(folder)
    config = {"model": to_dict(DECODER), "modality": to_dict({"image": IMAGE})}
    layout.write_manifest(folder, layout.Manifest(step=step, config=config, progress={}))
    return folder


def saved(exp_dir: Path, *steps: int) -> Path:
    for step in steps:
        complete(layout.step_dir(exp_dir, step), step)
    layout.mark_latest(exp_dir, steps[-1])
    return exp_dir


def test_the_three_kinds_of_checkpoint(tmp_path: Path):
    imported = complete(tmp_path / "import")
    exp_dir = saved(tmp_path / "run", 5, 10)
    assert layout.resolve(imported) == imported
    assert layout.resolve(layout.step_dir(exp_dir, 5)) == layout.step_dir(exp_dir, 5)
    assert layout.resolve(str(exp_dir)) == layout.step_dir(exp_dir, 10)


def test_architecture_survives_the_manifest(tmp_path: Path):
    architecture = layout.read_architecture(complete(tmp_path / "import"))
    assert architecture.model == DECODER and isinstance(architecture.model, DecoderConfig)
    assert architecture.modality == {"image": IMAGE}


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_says_what_to_do(tmp_path: Path, version: object):
    folder = complete(tmp_path / "import")
    file = folder / layout.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version, "code_version": "9.9"}))
    with pytest.raises(CheckpointError) as caught:
        layout.read_manifest(folder)
    for words in (repr(version), f"reads format {layout.FORMAT_VERSION}", "9.9", "convert.py import"):
        assert words in str(caught.value)


def test_a_damaged_manifest_is_named(tmp_path: Path):
    folder = complete(tmp_path / "import")
    (folder / layout.MANIFEST).write_text('{"step": 3')
    with pytest.raises(CheckpointError, match=r"qwen3_vlm\.json is not JSON .*use another one"):
        layout.read_manifest(folder)


@pytest.mark.parametrize(
    "text",
    [
        b'{"format_version": 1, "step": 0, "config": {}, "progress": {}, "more": 1}',
        b'{"format_version": 1, "step": 0, "config": {}}',
        b'{"format_version": 1, "step": 0, "config": {}, "progress": {}}',
        b'{"format_version": 1, "step": 0, "config": {"model": null, "modality": {}}, "progress": {}}',
        b'{"format_version": 1, "step": 0, "config": [], "progress": {}}',
        b'{"format_version": 1, "step": null, "config": {}, "progress": {}}',
        b"\xff",
    ],
    ids=["extra key", "key missing", "no model", "null model", "config", "step", "bytes"],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, text: bytes):
    folder = complete(tmp_path / "import")
    (folder / layout.MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"qwen3_vlm\.json.*use another one"):
        layout.read_architecture(folder)


# History.


def trained(exp_dir: Path, step: int, source: Path, part: str) -> Path:
    """A saved step as the trainer writes it."""
    folder = layout.step_dir(exp_dir, step)
    layout.start(folder)
    layout.copy_processor(layout.latest_step_dir(exp_dir) or source, folder)
    config = {
        "train": {"trainable": [part], "global_batch_size": 8, "seq_length": 64},
        "optim": {"lr": 1},
        "precision": {"name": "bf16"},
        "data": {"path": f"/secret/{part}_data"},
    }
    layout.write_manifest(folder, layout.Manifest(step=step, config=config, progress={"samples": 10 * step}))
    layout.mark_latest(exp_dir, step)
    return folder


def test_a_checkpoint_knows_every_training_before_it(tmp_path: Path):
    """Two saves of a run are one training; an import is none."""
    imported = complete(tmp_path / "import")
    (imported / layout.PROCESSOR).mkdir()
    assert layout.trainings(imported) == []
    first, second = tmp_path / "first", tmp_path / "second"
    for step in (5, 10):
        trained(first, step, imported, "align")
    last = [trained(second, step, layout.resolve(first), "sft") for step in (3, 6)][-1]
    found = layout.trainings(last)
    assert [(one["trained"], one["steps"], one["samples"], one["data"]) for one in found] == [
        (["align"], 10, 100, "align_data"),
        (["sft"], 6, 60, "sft_data"),
    ]
    assert layout.read_history(last) == found[:1]


@pytest.mark.parametrize("text", ["{", "{}x", "[1]", '[{"trained": []}]', "3", '{"a": 1}'])
def test_a_history_of_another_form_is_refused(tmp_path: Path, text: str):
    (tmp_path / layout.HISTORY).write_text(text)
    with pytest.raises(CheckpointError, match=r"history\.json is no history"):
        layout.read_history(tmp_path)


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "incomplete checkpoint", "run without a save"])
def test_what_is_no_checkpoint_is_refused_with_what_would_be_one(tmp_path: Path, kind: str):
    folder = tmp_path / "here"
    if kind == "empty folder":
        folder.mkdir()
    elif kind == "incomplete checkpoint":
        layout.start(folder)
    elif kind == "run without a save":
        layout.start(layout.step_dir(folder, 5))
    with pytest.raises(CheckpointError, match=rf"{folder} holds no checkpoint.*an exp_dir with at least one save"):
        layout.resolve(folder)


@pytest.mark.parametrize("name", ["step_00000010", "../elsewhere", "step_00000005/.."])
def test_a_mark_that_names_no_complete_step_is_refused(tmp_path: Path, name: str):
    exp_dir = saved(tmp_path / "run", 5)
    layout.start(layout.step_dir(exp_dir, 10))
    complete(tmp_path / "run" / "elsewhere")
    (layout.checkpoints_dir(exp_dir) / layout.LATEST).write_text(name + "\n")
    with pytest.raises(CheckpointError, match="not a complete step"):
        layout.latest_step_dir(exp_dir)


def test_start_clears_an_interrupted_save_and_nothing_else(tmp_path: Path):
    interrupted = tmp_path / "interrupted"
    layout.start(interrupted)
    (interrupted / layout.STATE / "__0_0.distcp").touch()
    (interrupted / layout.STATE / ".metadata.tmp").touch()
    layout.start(interrupted)
    assert [p.name for p in interrupted.rglob("*")] == [layout.STATE]


@pytest.mark.parametrize("folder", ["", layout.STATE, layout.PROCESSOR, f"{layout.STATE}/more", "other"])
@pytest.mark.parametrize("replace", [False, True])
def test_start_removes_nothing_that_is_not_a_checkpoints(tmp_path: Path, folder: str, replace: bool):
    foreign = tmp_path / "foreign" / folder / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with pytest.raises(CheckpointError, match=r"not ours \(it holds .*thesis\.tex"):
        layout.start(tmp_path / "foreign", replace=replace)
    assert foreign.exists()


def test_start_follows_a_link_to_an_empty_folder_and_refuses_a_file(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    layout.start(tmp_path / "out")
    assert (tmp_path / "disk" / layout.STATE).is_dir()
    (tmp_path / "file").touch()
    for out, word in (("file", "is a file"), ("file/out", "Not a directory")):
        with pytest.raises(CheckpointError, match=word):
            layout.start(tmp_path / out)


def test_a_complete_checkpoint_is_replaced_only_if_asked(tmp_path: Path):
    folder = complete(tmp_path / "import")
    with pytest.raises(CheckpointError, match="already holds a complete checkpoint"):
        layout.start(folder)
    assert (folder / layout.MANIFEST).exists()
    layout.start(folder, replace=True)
    assert not (folder / layout.MANIFEST).exists()


def steps_left(exp_dir: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in layout.checkpoints_dir(exp_dir).glob("step_*"))


@pytest.mark.parametrize(("keep", "left"), [(1, [20]), (2, [15, 20]), *((n, [5, 10, 15, 20]) for n in (4, 5, 7, 9))])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]):
    exp_dir = saved(tmp_path / "run", 5, 10, 15, 20)
    removed = layout.prune(exp_dir, keep)
    assert steps_left(exp_dir) == left
    assert len(removed) == 4 - len(left)


def test_prune_keeps_what_latest_names(tmp_path: Path):
    exp_dir = saved(tmp_path / "run", 5, 10, 15)
    layout.mark_latest(exp_dir, 5)
    layout.prune(exp_dir, 1)
    assert steps_left(exp_dir) == [5, 15]
    assert layout.latest_step_dir(exp_dir) == layout.step_dir(exp_dir, 5)


def test_prune_counts_complete_steps_alone(tmp_path: Path):
    exp_dir = saved(tmp_path / "run", 5, 10)
    layout.start(layout.step_dir(exp_dir, 15))
    layout.prune(exp_dir, 2)
    assert steps_left(exp_dir) == [5, 10, 15]
