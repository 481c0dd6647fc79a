"""kill -9 in the middle of preparation: the folder does not look complete, and the next run gives the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from qwen3_vlm.data.prepare import Form, Options, llava, prepare_llava, shards
from qwen3_vlm.data.source import train_samples
from qwen3_vlm.errors import DataError
from tests.unit.data.cases import jpeg

ROOT = Path(__file__).parents[3]

# Parts of 20 rows and a little wait in each, so that there is a middle to be killed in.
SLOW = """
import sys, time
from pathlib import Path
from qwen3_vlm.data.prepare import Form, llava, prepare_llava, shards
llava.ROWS_PER_PART = 20
def slow(function):
    def wrapped(*args, **kwargs):
        time.sleep(0.3)
        return function(*args, **kwargs)
    return wrapped
llava.LlavaReader.read = slow(llava.LlavaReader.read)
shards._write_shard = slow(shards._write_shard)
source, images, out = map(Path, sys.argv[1:4])
prepare_llava(source, images, out, form=Form.tar, jobs=2, val_fraction=0.1, shard_images=10)
"""


def start(tmp_path: Path) -> subprocess.Popen:
    arguments = [tmp_path / "rows.json", tmp_path / "images.zip", tmp_path / "out"]
    return subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], cwd=ROOT, start_new_session=True)


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def wait_for(pattern: str, out: Path, count: int, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if len(list(out.glob(pattern))) >= count:
            return
        assert process.poll() is None, f"it ended before there were {count} {pattern}"
        time.sleep(0.01)
    pytest.fail(f"no {count} {pattern} in a minute")


def test_restart_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = []
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(200):
            turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": f"No. {i}"}]
            rows.append({"id": f"r{i % 150}", "image": f"{i % 60}.jpg", "conversations": turns})
            if i < 55:  # the images of some rows are missing
                archive.writestr(f"{i}.jpg", jpeg(i))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    monkeypatch.setattr(llava, "ROWS_PER_PART", 20)

    def prepare() -> None:
        options = Options(form=Form.tar, jobs=2, val_fraction=0.1, shard_images=10)
        prepare_llava(tmp_path / "rows.json", tmp_path / "images.zip", out, options)

    prepare()
    straight = files(out)
    assert json.loads(straight["report.json"])["dropped"] == {"missing_file": 15}
    shutil.rmtree(out)

    for pattern, finished in ((".work/parts/*.json", 3), ("shards/shard-*.json", 2)):
        process = start(tmp_path)
        wait_for(pattern, out, finished, process)
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers have to notice
        process.wait()
        with pytest.raises(DataError, match="did not finish"):
            train_samples(str(out))

    done_before = {p.name for p in out.glob("shards/shard-*.json")}
    log, write_shard = tmp_path / "written.log", shards._write_shard

    def logged(path: Path, images: dict) -> dict[str, int]:  # runs in the workers
        with log.open("a") as file:
            file.write(f"{path.stem}.json\n")
        return write_shard(path, images)

    monkeypatch.setattr(shards, "_write_shard", logged)
    prepare()
    assert files(out) == straight
    written = log.read_text().split()
    assert written and done_before.isdisjoint(written)  # what was done stayed


def test_work_of_other_options_is_not_continued(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(1))
    turns = [{"from": "human", "value": "none"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "1", "image": "a.jpg", "conversations": turns}]))
    arguments = (tmp_path / "rows.json", tmp_path / "images", tmp_path / "out")
    with pytest.raises(DataError, match=r"none is left .*1: 0 <image> in the text, 1 images"):
        prepare_llava(*arguments)
    assert (tmp_path / "out" / ".work").is_dir()
    assert prepare_llava(*arguments, repair_placeholders=True).kept == 1
    assert not (tmp_path / "out" / ".work").exists()
