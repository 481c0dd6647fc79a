"""What cannot be is refused before a model is built, by one line that says why and names the way out."""

from pathlib import Path

import pytest

from tests.train.runs import overrides, train


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("model.hiden=9", ["model.hiden", "model.hidden_size"]),
        ("+model.hiden=9", ["model.hiden", "model.hidden_size"]),
        ("parallel=tp2", ["1 processes are not divisible by parallel.tp * pp * cp"]),
        ("train.micro_batch_size=3", ["train.global_batch_size 2 is not divisible by train.micro_batch_size 3"]),
    ],
)
def test_a_run_that_cannot_be_is_refused(checkpoint: Path, data: Path, tmp_path: Path, argument: str, words: list[str]):
    done = train([*overrides(checkpoint, data, tmp_path / "run"), argument])
    assert done.returncode == 1, done.describe()
    (error,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert all(word in error for word in words), error
    assert "Traceback" not in done.output
    assert "backend" not in done.output and not (tmp_path / "run").exists()  # nothing was built
