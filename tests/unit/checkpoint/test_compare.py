"""Two runs side by side: the first difference is named, and equal runs are called equal."""

import copy
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import typer
from typer.testing import CliRunner

from qwen3_vlm.checkpoint import compare, layout
from qwen3_vlm.checkpoint.stream import StateReader
from qwen3_vlm.errors import CheckpointError

STACK = "language_model.decoder.layers.mlp.linear_fc2.weight"
ROOT = Path(__file__).resolve().parents[3]


EMBEDDING = "language_model.embedding.word_embeddings.weight"
VOCAB_SIZE = 5
COMMON = {
    "optimizer": {"optimizer": {"param_groups": [{"step": 2, "lr": 0.5, "betas": (0.9, 0.999)}]}},
    "scheduler": {"num_steps": 4},
}


def write_run(
    folder: Path,
    *,
    losses: list[float],
    tensors: dict[int, dict[str, Any]],
    common: dict[str, Any] = COMMON,
    **keys: Any,
) -> Path:
    """An exp_dir with metrics (`keys` are in each line) and saved steps."""
    folder.mkdir()
    lines = [{"step": n, "loss": loss, "step_time_s": 1.0 / n} | keys for n, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, state in tensors.items():
        directory = layout.step_dir(folder, step)
        directory.mkdir(parents=True)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory / layout.STATE), no_dist=True)
        torch.save(common, directory / layout.STATE / "common.pt")
        manifest = layout.Manifest(step=step, config={"model": {"vocab_size": VOCAB_SIZE}}, progress={})
        layout.write_manifest(directory, manifest)
    return folder


def tensors(**changes: Any) -> dict[str, torch.Tensor]:
    state = {STACK: torch.ones(3, 2, 2), "towers.image.resampler.latents": torch.ones(4, 2)}
    return state | changes


def test_equal_runs(tmp_path: Path):
    runs = [write_run(tmp_path / n, losses=[2.0, 1.0], tensors={2: tensors()}) for n in "ab"]
    assert compare.first_metric_difference(*runs, tolerance=0) is None
    assert compare.common_steps(*runs) == [2]
    states = [layout.step_dir(run, 2) / layout.STATE for run in runs]
    assert compare.tensor_differences(*states, tolerance=0) == []


def test_the_first_step_and_the_layer_are_named(tmp_path: Path):
    other = torch.ones(3, 2, 2)
    other[1, 0, 0] += 1e-3
    a = write_run(tmp_path / "a", losses=[2.0, 1.0, 0.5], tensors={2: tensors()})
    b = write_run(tmp_path / "b", losses=[2.0, 1.1, 0.7], tensors={2: tensors(**{STACK: other})})
    found = compare.first_metric_difference(a, b, tolerance=1e-5)
    assert found == compare.MetricDifference(step=2, key="loss", a=1.0, b=1.1)
    assert compare.first_metric_difference(a, b, tolerance=0.5) is None
    states = [layout.step_dir(run, 2) / layout.STATE for run in (a, b)]
    [difference] = compare.tensor_differences(*states, tolerance=0)
    assert difference.name == f"{STACK}[1]"
    assert difference.largest == pytest.approx(1e-3, rel=1e-3)
    assert difference.relative == pytest.approx(5e-4, rel=1e-3)
    assert compare.tensor_differences(*states, tolerance=1e-3) == []


def test_a_missing_tensor_is_a_difference(tmp_path: Path):
    runs = [tmp_path / n for n in "ab"]
    write_run(runs[0], losses=[1.0], tensors={1: tensors(extra=torch.ones(1))})
    write_run(runs[1], losses=[1.0], tensors={1: tensors()})
    states = [layout.step_dir(run, 1) / layout.STATE for run in runs]
    [difference] = compare.tensor_differences(*states, tolerance=1e-5)
    assert (difference.name, difference.relative) == ("extra", float("inf"))


def test_runs_without_a_common_step_are_refused(tmp_path: Path):
    a = write_run(tmp_path / "a", losses=[1.0], tensors={})
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl does not exist"):
        compare.first_metric_difference(a, tmp_path / "nothing", tolerance=0)


def ask(*arguments: Any) -> tuple[int, str]:
    """Exit code and output of the tool."""
    app = typer.Typer()
    app.command()(runpy.run_path(str(ROOT / "tools/compare_runs.py"))["main"])
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, done.output


def changed(*values: float) -> dict[str, torch.Tensor]:
    """The tensors with other values in the first places of a layer."""
    stack = torch.ones(3, 2, 2)
    stack[1].view(-1)[: len(values)] = torch.tensor(values)
    return tensors(**{STACK: stack})


def state_of(run: Path) -> Path:
    return layout.step_dir(run, 1) / layout.STATE


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, math.nan, True),
        (math.nan, 1.0, True),
        (1.0, math.inf, True),
        (math.inf, -math.inf, True),
        (math.inf, math.nan, True),
        (math.nan, math.nan, False),
        (math.inf, math.inf, False),
        (1.0, 1.0 + 1e-6, False),
        (1.0, 1.0 + 1e-4, True),
        (1.0, None, True),
        (torch.ones(2), torch.ones(2), False),
        (torch.ones(2), torch.ones(3), True),
        (torch.ones(1), 1.0, True),
    ],
)
def test_numbers(a: Any, b: Any, expected: bool):
    assert compare.differs(a, b, 1e-5) is expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_differs_from_what_is(tmp_path: Path, value: float):
    """In either run; in both at the same place it is equal, and does not hide a difference beside it."""
    runs = [
        write_run(tmp_path / name, losses=[1.0], tensors={1: changed(*values)})
        for name, values in {"good": [1.0], "bad": [value], "same": [value], "beside": [value, 1.5]}.items()
    ]
    good, bad, same, beside = (state_of(run) for run in runs)
    for pair in ((good, bad), (bad, good)):
        assert compare.tensor_differences(*pair, 0.5) == [
            compare.TensorDifference(name=f"{STACK}[1]", largest=math.inf, relative=math.inf)
        ]
    assert compare.tensor_differences(bad, same, 0) == []
    [difference] = compare.tensor_differences(bad, beside, 1e-5)
    assert difference.largest == 0.5 and difference.relative == pytest.approx(0.5 / 3**0.5)
    assert ask(runs[0], runs[1], "--tolerance", 1e-5)[0] == 1
    assert ask(runs[1], runs[0], "--tolerance", 1e-5)[0] == 1
    assert ask(runs[1], runs[2])[0] == 0


def test_a_loss_that_is_not_a_number(tmp_path: Path):
    a, b = (write_run(tmp_path / n, losses=[loss], tensors={}) for n, loss in (("a", 1.0), ("b", math.nan)))
    code, output = ask(a, b, "--tolerance", 1e-5)
    assert code == 1 and "step 1: loss is 1.0 and nan" in output


@pytest.mark.parametrize(
    "name", [EMBEDDING, "language_model.output_layer.weight", f"optimizer.state.exp_avg.{EMBEDDING}"]
)
def test_padding_rows_of_the_vocabulary_are_not_compared(tmp_path: Path, name: str):
    """What two layouts save: tp 2 and tp 3 pad 5 rows to 6."""
    rows = torch.arange(12.0).reshape(6, 2)
    other = rows.clone()
    other[5] += 1
    wrong = rows.clone()
    wrong[4] += 1
    a, b, c, d = (
        write_run(tmp_path / n, losses=[1.0], tensors={1: tensors(**{name: value})})
        for n, value in {"a": rows[:5].clone(), "b": rows, "c": other, "d": wrong}.items()
    )
    for pair in ((a, b), (b, a), (b, c)):
        code, output = ask(*pair)
        assert code == 0 and "all tensors agree" in output
    code, output = ask(a, d)
    assert code == 1 and name in output
    assert compare.tensor_differences(state_of(a), state_of(b), 0)[0].largest == math.inf  # without a vocabulary
    short = write_run(tmp_path / "e", losses=[1.0], tensors={1: tensors(**{name: rows[:4].clone()})})
    assert ask(a, short)[0] == 1


def test_keys_of_the_other_run_are_seen(tmp_path: Path):
    a = write_run(tmp_path / "a", losses=[1.0], tensors={})
    b = write_run(tmp_path / "b", losses=[1.0], tensors={}, aux_loss=0.5)
    for runs, values in (((a, b), (compare.ABSENT, 0.5)), ((b, a), (0.5, compare.ABSENT))):
        found = compare.first_metric_difference(*runs, tolerance=1)
        assert found == compare.MetricDifference(step=1, key="aux_loss", a=values[0], b=values[1])


def test_a_run_that_ended_early_is_told(tmp_path: Path):
    """It is no difference, but never passed over."""
    a = write_run(tmp_path / "a", losses=[2.0, 1.0], tensors={})
    b = write_run(tmp_path / "b", losses=[2.0, 1.0, 0.5], tensors={})
    code, output = ask(a, b)
    assert code == 0 and "agree in 2 steps" in output
    assert f"{a} has 2 steps, the last 2; {b} has 3 steps, the last 3" in output
    assert "not all steps" not in ask(a, a)[1]


def test_values_beside_the_tensors(tmp_path: Path):
    other = copy.deepcopy(COMMON)
    other["optimizer"]["optimizer"]["param_groups"][0]["step"] = 3
    other["scheduler"]["max_lr"] = 0.5
    a = write_run(tmp_path / "a", losses=[1.0], tensors={1: tensors()})
    b = write_run(tmp_path / "b", losses=[1.0], tensors={1: tensors()}, common=other)
    assert compare.object_differences(state_of(a), state_of(a), 0) == []
    assert compare.object_differences(state_of(a), state_of(b), 0) == [
        compare.ObjectDifference(name="optimizer.optimizer.param_groups[0].step", a="2", b="3"),
        compare.ObjectDifference(name="scheduler.max_lr", a=compare.ABSENT, b="0.5"),
    ]
    report = tmp_path / "report.json"
    code, output = ask(a, b, "--json", report)
    assert code == 1 and "all tensors agree" in output and "param_groups[0].step is 2 and 3" in output
    assert [o["name"] for o in json.loads(report.read_text())["objects"]][1] == "scheduler.max_lr"


def test_tensors_are_read_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the size of a group and of a slice: also where a tensor is larger than both."""
    a = write_run(tmp_path / "a", losses=[1.0], tensors={1: changed(1.0)})
    b = write_run(tmp_path / "b", losses=[1.0], tensors={1: changed(1.0, 3.0) | {"few": torch.arange(7.0)}})
    whole = compare.tensor_differences(state_of(a), state_of(b), 0)
    assert [(d.name, d.largest) for d in whole] == [("few", math.inf), (f"{STACK}[1]", 2.0)]
    passes = []
    read_rows = StateReader.read_rows
    monkeypatch.setattr(StateReader, "read_rows", lambda self, rows: passes.append(rows) or read_rows(self, rows))
    assert compare.tensor_differences(state_of(a), state_of(b), 0) == whole
    assert len(passes) == 2  # one for each side
    monkeypatch.setattr(compare, "GROUP_BYTES", 20)
    monkeypatch.setattr(compare, "_SLICE", 3)
    assert compare.tensor_differences(state_of(a), state_of(b), 0) == whole
    assert len(passes) > 8


def test_command_line(tmp_path: Path):
    a = write_run(tmp_path / "a", losses=[2.0, 1.0], tensors={1: changed(1.0)})
    b = write_run(tmp_path / "b", losses=[2.0, 1.5], tensors={})
    c = write_run(tmp_path / "c", losses=[2.0, 1.0], tensors={1: changed(math.nan)})
    command = [sys.executable, str(ROOT / "tools/compare_runs.py"), str(a)]
    same = subprocess.run([*command, str(a)], capture_output=True, text=True, check=False)
    assert same.returncode == 0 and "metrics agree" in same.stdout
    other = subprocess.run([*command, str(b)], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "step 2: loss is 1.0 and 1.5" in other.stdout
    not_a_number = subprocess.run([*command, str(c), "--tolerance", "1"], capture_output=True, text=True, check=False)
    assert not_a_number.returncode == 1 and f"inf largest  {STACK}[1]" in not_a_number.stdout
