"""Downloads from local servers of the same protocols: resume, lost connections, checks, dry runs, refusals."""

import hashlib
import importlib.util
import io
import json
import os
import random
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import pytest

from qwen3_vlm.data import download
from qwen3_vlm.data.download import HUB_SETS, WebFile, fetch_file, plan_hub
from qwen3_vlm.errors import DataError
from tests.unit.data.servers import Served, serve

ROOT = Path(__file__).parents[3]
NOISE = random.Random(0).randbytes(300_000)


def make_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)


def web_file(url: str, content: bytes) -> WebFile:
    md5 = hashlib.md5(content).hexdigest()
    return WebFile(name="train2017.zip", url=f"{url}/t.zip", size=len(content), md5=md5, licence="none")


@pytest.fixture
def archive() -> bytes:
    return make_zip({"train2017/1.jpg": NOISE, "train2017/2.jpg": b"two", "../../out.jpg": b"no"})


def test_a_file_whose_connection_is_lost_again_and_again(tmp_path: Path, archive: bytes):
    with serve(Served({"t.zip": archive}, cut_after=60_000, cuts_left=4)) as served:
        done = fetch_file(web_file(served.url, archive), tmp_path)
        starts = [int((r or "bytes=0-")[6:-1]) for method, _, r in served.requests if method == "GET"]
        assert len(starts) == 5 and starts[0] == 0
        assert all(0 < b - a <= 60_000 for a, b in pairwise(starts))  # each went on from what the last one had brought
        assert (tmp_path / "train2017.zip").read_bytes() == archive
        assert (tmp_path / "train2017" / "1.jpg").read_bytes() == NOISE and done.unpacked[0].files == 2
        assert done.unpacked[0].refused == {"outside_root": 1} and not (tmp_path / "../out.jpg").resolve().exists()
        fetch_file(web_file(served.url, archive), tmp_path)
        assert len(served.requests) == 5  # what is there is not asked for again


def test_a_new_process_goes_on_where_the_last_one_stopped(tmp_path: Path, archive: bytes):
    (tmp_path / "train2017.zip.partial").write_bytes(archive[:100_000])
    with serve(Served({"t.zip": archive})) as served:
        fetch_file(web_file(served.url, archive), tmp_path)
        assert [r for _, _, r in served.requests] == ["bytes=100000-"]
    assert (tmp_path / "train2017.zip").read_bytes() == archive


def test_a_server_without_ranges_begins_again(tmp_path: Path, archive: bytes):
    with serve(Served({"t.zip": archive}, cut_after=60_000, cuts_left=2, ranges=False)) as served:
        fetch_file(web_file(served.url, archive), tmp_path)
    assert (tmp_path / "train2017.zip").read_bytes() == archive


def test_a_partial_file_that_is_too_long_is_thrown_away(tmp_path: Path, archive: bytes):
    (tmp_path / "train2017.zip.partial").write_bytes(archive + b"more")
    with serve(Served({"t.zip": archive})) as served:
        fetch_file(web_file(served.url, archive), tmp_path)
    assert (tmp_path / "train2017.zip").read_bytes() == archive


def test_other_content_than_the_published_one_is_refused(tmp_path: Path, archive: bytes):
    changed = archive[:-1] + bytes([archive[-1] ^ 1])
    with serve(Served({"t.zip": changed})) as served:
        with pytest.raises(DataError, match=r"have MD5 \w+, expected \w+; they were deleted"):
            fetch_file(web_file(served.url, archive), tmp_path)
        assert not list(tmp_path.iterdir())
        with pytest.raises(DataError, match=r"it is not the published file"):
            fetch_file(replace(web_file(served.url, archive), size=len(archive) + 5), tmp_path)


def test_a_dead_server_is_an_error_that_says_how_to_go_on(tmp_path: Path, archive: bytes):
    with (
        serve(Served({"t.zip": archive}, cut_after=0, cuts_left=99)) as served,
        pytest.raises(DataError, match=r"0 of \d+ bytes after 5 attempts without a new one .* run the command again"),
    ):
        fetch_file(web_file(served.url, archive), tmp_path)
    with serve(Served({})) as served, pytest.raises(DataError, match=r"404"):
        fetch_file(web_file(served.url, archive), tmp_path)


MANTIS = {
    "README.md": b"about",
    "nlvr2/train-00000-of-00001.parquet": b"rows" * 1000,
    "dreamsim/train-00000-of-00001.parquet": b"more",
    "script.py": b"raise SystemExit('ran')",
}


def run_tool(served: Served, *arguments: str, token: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": served.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, str(ROOT / "tools/download_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_hub_subsets_with_lost_connections(tmp_path: Path):
    out, report = tmp_path / "out", tmp_path / "done.json"
    chunk = 10 * 2**20  # that huggingface_hub reads at a time
    large = random.Random(1).randbytes(3 * chunk)
    files = MANTIS | {"nlvr2/train_images.zip": make_zip({"train_images/0.jpg": large, "/abs.jpg": b"no"})}
    with serve(Served(files, cut_after=chunk + 99, cuts_left=2), repo=HUB_SETS["mantis"].repo) as served:
        done = run_tool(served, "mantis", "--subsets", "nlvr2", "--out", str(out), "--json", str(report), token="hf_x")
        assert done.returncode == 0, done.stderr
        assert served.cuts_left == 0
        resumed = [r for _, path, r in served.requests if path.endswith("train_images.zip") and r]
        assert resumed == [f"bytes={chunk}-", f"bytes={2 * chunk}-"]
        assert "Bearer hf_x" in served.tokens
    for name in ("nlvr2/train-00000-of-00001.parquet", "nlvr2/train_images.zip"):
        assert (out / name).read_bytes() == files[name]
    assert (out / "nlvr2" / "train_images" / "0.jpg").read_bytes() == large
    assert not (out / "dreamsim").exists() and not list(out.rglob("*.py"))
    assert "refused: {'outside_root': 1}" in done.stdout
    assert json.loads(report.read_text())["unpacked"][0]["files"] == 1


def test_hub_dry_run_unknown_subset_and_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {"blip_laion_cc_sbu_558k.json": b"[]" * 700, "images.zip": b"z" * 5000, "blip_meta.json": b""}
    with serve(Served(files), repo=HUB_SETS["llava-pretrain"].repo) as served:
        dry = run_tool(served, "llava-pretrain", "--out", str(tmp_path / "out"), "--dry-run")
        assert dry.returncode == 0 and not (tmp_path / "out").exists(), dry.stderr
        assert "1,400  blip_laion_cc_sbu_558k.json" in dry.stdout and "6,400  bytes in 2 files" in dry.stdout
        assert "images.zip has limits of its own" in dry.stdout
    with serve(Served(MANTIS), repo=HUB_SETS["mantis"].repo) as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        with pytest.raises(DataError, match=r"has no subset nlvr3; it has dreamsim, nlvr2"):
            plan_hub("mantis", subsets=["nlvr3"])
        with pytest.raises(DataError, match=r"has no file like \*.csv; it has README.md"):
            plan_hub("mantis", include=["*.csv"])
        plan = plan_hub("mantis", subsets=["dreamsim"])
        assert [file.name for file in plan.files] == ["dreamsim/train-00000-of-00001.parquet"]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    with pytest.raises(DataError, match=r"ConnectError.*\n.*set HF_ENDPOINT to a mirror"):
        plan_hub("mantis")


def test_coco_dry_run(capsys: pytest.CaptureFixture[str]):
    spec = importlib.util.spec_from_file_location("download_data", ROOT / "tools/download_data.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.coco2017(out=Path("nowhere"), dry_run=True)
    printed = capsys.readouterr().out
    assert "19,336,861,798  train2017.zip" in printed and "Flickr" in printed and not Path("nowhere").exists()
