"""tools/convert.py as users call it: what cannot be written is one line on stderr, before any work."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_vlm.checkpoint import layout
from tests.hf_folders import import_folders, write_llm, write_tower

TOOL = Path(__file__).parents[3] / "tools" / "convert.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_llm(folder / "llm", num_hidden_layers=1)
    write_tower(folder / "tower", num_hidden_layers=1)
    import_folders(folder / "llm", folder / "tower", folder / "ckpt")
    return folder


NO_FOLDER, FILE = ("new", "nodir/x.json", "nodir/x.json cannot be written"), ("file", "x.json", "file is a file")


@pytest.mark.parametrize(
    ("command", "wrong"),
    [("import", NO_FOLDER), ("import", FILE), ("export", NO_FOLDER), ("export", FILE), ("verify", NO_FOLDER)],
)
def test_what_cannot_be_written_is_one_line(folders: Path, tmp_path: Path, command: str, wrong: tuple[str, str, str]):
    out, json, words = wrong
    (tmp_path / "file").touch()
    sources = {
        "import": ["--llm", folders / "llm", "--vision", folders / "tower", "--out", out],
        "export": ["--checkpoint", folders / "ckpt", "--out", out],
        "verify": ["--checkpoint", folders / "ckpt", "--hf", folders / "llm"],
    }
    done = subprocess.run(
        [sys.executable, str(TOOL), command, *map(str, sources[command]), "--json", json],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_import_into_the_folder_where_the_shell_stands(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    import_folders(folders / "llm", folders / "tower", Path())
    assert layout.resolve(tmp_path) == tmp_path and tmp_path.stat().st_ino == inode
