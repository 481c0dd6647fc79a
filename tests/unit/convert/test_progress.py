"""A conversion says how far it is on a terminal, and in the log elsewhere."""

import pytest

from qwen3_vlm.convert import progress


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that were logged."""
    lines: list[str] = []
    monkeypatch.setattr(progress.logger, "info", lines.append)
    return lines


def test_quiet_off_a_terminal(log: list[str], capsys: pytest.CaptureFixture):
    with progress.ByteProgress("import", 100) as bar:
        for _ in range(10):
            bar.add(10)
    assert capsys.readouterr() == ("", "") and not log


def test_a_long_one_is_logged(log: list[str], monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.ByteProgress("import", 4 * 10**9) as bar:
        for _ in range(4):
            now[0] += 20
            bar.add(10**9)
    assert log == [
        "import: 2.0 of 4.0 GB, 50 MB/s, 40 s left",
        "import: 4.0 of 4.0 GB, 50 MB/s, 0 s left",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.ByteProgress("import", 4 * 10**9) as bar:
        bar.add(4 * 10**9)
    assert "import: 100%" in capsys.readouterr().err
