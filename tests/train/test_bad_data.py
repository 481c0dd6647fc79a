"""Bad samples: counted by reason, named, and never in the way; or, if asked, the end of the run at the first."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.train.runs import Run, overrides, prepared, row, train

GOOD = 10
REASONS = {
    "corrupt": "corrupt_image",
    "truncated": "corrupt_image",
    "missing": "missing_file",
    "too_many": "placeholder_mismatch",
    "too_few": "placeholder_mismatch",
    "empty": "empty_conversation",
    "long": "over_long",
    "outside": "outside_root",
    "absolute": "outside_root",
    "endless": "unreadable_file",
    "loop": "unreadable_file",
    "form": "bad_row",
}
"""Key of each bad sample -> the reason it is counted under."""


def line(key: str, images: list[str], *, content: str = "<image> What?", answer: str = "A cat.") -> str:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": key, "messages": turns, "media": {"image": images}})


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good rows, and one bad row of every kind behind preparation's back."""
    folder = tmp_path_factory.mktemp("bad")
    lines = [
        line("corrupt", ["corrupt.jpg"]),
        line("truncated", ["truncated.jpg"]),
        line("missing", ["nowhere.jpg"]),
        line("too_many", ["s0_0.jpg"], content="<image> <image> What?"),
        line("too_few", ["s0_0.jpg", "s1_0.jpg"]),
        json.dumps({"id": "empty", "messages": [], "media": {}}),
        line("long", ["s0_0.jpg"], answer="word " * 60),
        line("outside", ["../secret.jpg"]),
        line("absolute", [str(folder / "secret.jpg")]),
        line("endless", ["y" * 5000 + ".jpg"]),
        line("loop", ["loop/a.jpg"]),
        json.dumps({"id": "form", "messages": "What?"}),
        "{not JSON}",
    ]
    out = prepared(folder, [row(n) for n in range(GOOD)], extra_lines=lines)
    good = (folder / "images" / "s0_0.jpg").read_bytes()
    (folder / "secret.jpg").write_bytes(good)  # reachable, were the name not refused
    (folder / "images" / "truncated.jpg").write_bytes(good[: len(good) // 3])
    (folder / "images" / "loop").mkdir()
    (folder / "images" / "loop" / "a.jpg").symlink_to("b.jpg")
    (folder / "images" / "loop" / "b.jpg").symlink_to("a.jpg")
    (folder / "images" / "corrupt.jpg").write_bytes(b"\xff\xd8\xff never an image")
    return out


def test_each_is_counted_by_reason_and_named(checkpoint: Path, bad_data: Path, tmp_path: Path):
    run = Run(tmp_path / "run")
    done = train(overrides(checkpoint, bad_data, run.exp_dir, "train.epochs=1"))
    assert done.returncode == 0, done.describe()
    counted: Counter[str] = Counter()
    for metrics in run.metrics:
        counted.update(metrics["skipped"])
    assert counted == Counter(REASONS.values()) + Counter({"bad_row": 1})
    named = {s["key"]: s["reason"] for s in run.skipped}
    (unnamed,) = named.keys() - REASONS.keys()  # the line that is no JSON has no id: it is named by its place
    assert "train.jsonl" in unnamed and named.pop(unnamed) == "bad_row"
    assert named == REASONS
    assert all(s["detail"] for s in run.skipped)
    assert sorted(key for step in run.keys for key in step["keys"]) == sorted(f"s{n}" for n in range(GOOD))
    assert Counter(s["step"] for s in run.skipped) == Counter(
        {metrics["step"]: total for metrics in run.metrics if (total := sum(metrics["skipped"].values()))}
    )


@pytest.mark.full
def test_on_error_raise_stops_at_the_first_and_names_it(checkpoint: Path, bad_data: Path, tmp_path: Path):
    """Also if a worker process found it."""
    run = Run(tmp_path / "run")
    more = ("train.epochs=1", "data.on_error=raise", "data.num_workers=2")
    done = train(overrides(checkpoint, bad_data, run.exp_dir, *more))
    assert done.returncode == 1, done.describe()
    (error,) = [text for text in done.output.splitlines() if text.startswith("error: ")]
    (key, reason), *_ = re.findall(r"^error: sample '([^']+)': (\w+): ", error)
    assert reason == REASONS.get(key, "bad_row")
    assert "data.on_error=raise" in error
    assert not (run.exp_dir / "checkpoints").exists()


@pytest.mark.full
def test_a_run_in_which_nothing_can_be_learned_says_so(checkpoint: Path, bad_data: Path, tmp_path: Path):
    """It saves (before Adam ever saw a gradient), counts every sample and ends with an error, not with a hang."""
    run = Run(tmp_path / "run")
    more = ("train.epochs=1", "train.seq_length=8", "checkpoint.save_every=1")
    done = train(overrides(checkpoint, bad_data, run.exp_dir, *more))
    assert done.returncode == 1
    assert f"of {GOOD + len(REASONS) + 1} samples of {bad_data} none can be used" in done.output
    assert run.step_dir(1).is_dir()
    assert sum(sum(metrics["skipped"].values()) for metrics in run.metrics) == GOOD + len(REASONS) + 1
    assert all(metrics["loss"] is None and metrics["grad_norm"] is None for metrics in run.metrics)
