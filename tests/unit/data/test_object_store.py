"""Rows, shards and single images on an S3-compatible store: a local server behind a proxy that loses connections."""

import json
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.energon import local_copy
from multistorageclient import retry
from multistorageclient.shortcuts import _reinitialize_after_fork

from qwen3_vlm.data import source
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.prepare import Form, prepare_llava
from qwen3_vlm.data.sample import PackedRow
from qwen3_vlm.errors import DataError
from tests.unit.data.cases import jpeg, read_pass
from tests.unit.data.servers import Fault, Proxy, serve_proxy

boto3 = pytest.importorskip("boto3", reason="needs the extra s3")
moto = pytest.importorskip("moto.server", reason="needs moto (extra dev)")

Load = Callable[..., RowLoader]
BUCKET = "training"
ROWS = 12
TRIES = 3


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a local S3 server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto_server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto_server.start()
    yield moto_server.get_host_and_port()[1]
    moto_server.stop()


@dataclass
class Store:
    """A prepared folder, on this machine and in the store."""

    local: Path
    remote: Path
    """A blend of one: the folder's dataset.yaml in the store."""
    proxy: Proxy
    client: object
    waits: list[float]
    """Seconds that the multi-storage client waited before it tried again (it does not wait in tests)."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows with an image each in shards of four, one image of them broken."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "images").mkdir()
    for i in range(ROWS):
        (folder / "images" / f"{i}.jpg").write_bytes(b"broken" if i == 5 else jpeg(20 * i, (30 + i, 20)))
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": f"s{i}", "image": f"{i}.jpg", "conversations": turns} for i in range(ROWS)]
    (folder / "rows.json").write_text(json.dumps(rows))
    prepare_llava(folder / "rows.json", folder / "images", folder / "set", form=Form.tar, shard_images=4)
    return folder / "set"


@pytest.fixture
def store(server: int, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(local_copy, "LOCAL_COPY_TMP_DIR", tmp_path / "copies")
    waits: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(retry, "random", SimpleNamespace(uniform=lambda low, high: 0))
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0)
    shutil.copytree(prepared, tmp_path / "set")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server}")
    client.create_bucket(Bucket=BUCKET)
    for file in prepared.rglob("*"):
        if file.is_file():
            client.put_object(Bucket=BUCKET, Key=f"sets/set/{file.relative_to(prepared)}", Body=file.read_bytes())
    with serve_proxy(server) as proxy:
        options = {"base_path": BUCKET, "endpoint_url": proxy.url, "retries": {"total_max_attempts": 2}}
        profile = {
            "storage_provider": {"type": "s3", "options": options},
            "retry": {"attempts": TRIES, "delay": 1.0, "backoff_multiplier": 2.0},
        }
        (tmp_path / "msc.yaml").write_text(json.dumps({"profiles": {"store": profile}}))
        monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
        _reinitialize_after_fork()  # forget the profile of the test before
        blend = tmp_path / "remote.yaml"
        blend.write_text(
            "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n"
            "  train:\n    path: msc://store/sets/set/dataset.yaml\n"
        )
        yield Store(tmp_path / "set", blend, proxy, client, waits)
    listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": entry["Key"]} for entry in listed]})
    client.delete_bucket(Bucket=BUCKET)


def contents(rows: list[PackedRow]) -> list[tuple]:
    return [(row.keys, row.skipped, row.input_ids.tolist(), row.media["image"].data) for row in rows]


def assert_same(got: list[PackedRow], expected: list[PackedRow]) -> None:
    for one, other in zip(contents(got), contents(expected), strict=True):
        assert one[:3] == other[:3] and torch.equal(one[3], other[3])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_rows_are_those_of_the_local_folder(store: Store, make_loader: Load, num_workers: int):
    """Each image costs one request for its bytes alone; rows and index are fetched once for all processes."""
    expected = read_pass(make_loader(store.local))
    loader = make_loader(store.remote, num_workers=num_workers)
    opened = len(store.proxy.requests)
    got = read_pass(loader)
    assert_same(got, expected)
    assert Counter(skip.reason for row in got for skip in row.skipped) == {"corrupt_image": 1}
    assert sum(len(row.keys) for row in got) == ROWS - 1
    fetched = [request for request in store.proxy.requests[opened:] if request[1].endswith(".tar")]
    assert len(fetched) == ROWS and all(method == "GET" and span for method, _, span in fetched)
    assert len(set(fetched)) == ROWS
    for name in ("train.jsonl", "index.sqlite"):
        assert len([r for r in store.proxy.requests if r[0] == "GET" and r[1].endswith(f"/{name}")]) == 1
    assert not store.waits


def test_it_resumes_where_a_local_run_has_stopped(store: Store, make_loader: Load):
    expected = read_pass(make_loader(store.local))
    local = make_loader(store.local)
    local.next_rows()
    remote = make_loader(store.remote)
    remote.load_state_dict(local.state_dict())
    assert_same(read_pass(remote), expected[1:])


def test_rows_that_are_uploaded_again_are_fetched_again(store: Store, make_loader: Load):
    make_loader(store.remote)
    time.sleep(max(0.0, 1.05 - time.time() % 1))  # S3 counts whole seconds
    lines = (store.local / "train.jsonl").read_bytes().replace(b"A cat.", b"A dog.")
    store.client.put_object(Bucket=BUCKET, Key="sets/set/train.jsonl", Body=lines)
    texts = [row.input_ids.tolist() for row in read_pass(make_loader(store.remote))]
    assert texts != [row.input_ids.tolist() for row in read_pass(make_loader(store.local))]


@pytest.mark.parametrize(("kind", "num_workers"), [("cut", 0), ("cut", 2), ("503", 0), ("reset", 0)])
def test_lost_connections_are_tried_again(store: Store, make_loader: Load, kind: str, num_workers: int):
    expected = read_pass(make_loader(store.local))
    loader = make_loader(store.remote, num_workers=num_workers)
    fault = Fault("shard-000001.tar", kind, 2 if kind == "cut" else 1)
    store.proxy.faults.append(fault)
    assert_same(read_pass(loader), expected)
    assert fault.left == 0
    if kind == "cut" and num_workers == 0:
        assert store.waits == [1.0, 2.0], "the client waits longer each time"


@pytest.mark.parametrize(
    ("kind", "said", "num_workers"),
    [
        ("cut", "RetryableError: .*incomplete read", 0),
        ("cut", "RetryableError: .*incomplete read", 2),
        ("reset", "RuntimeError: .*ConnectionClosed", 0),
        ("503", "RetryableError: Service unavailable", 0),
        ("403", "PermissionError: ", 0),
    ],
)
def test_a_store_that_stays_away_stops_the_run(store: Store, make_loader: Load, kind: str, said: str, num_workers: int):
    loader = make_loader(store.remote, num_workers=num_workers)
    store.proxy.faults.append(Fault("shard-000001.tar", kind, 10**6))
    with pytest.raises(DataError) as caught:
        read_pass(loader)
    message = str(caught.value)
    assert (
        message.startswith("cannot read entry '0000000") and "from msc://store/sets/set/shards/shard-000001" in message
    )
    assert re.search(said, message) and "the same command resumes the run" in message
    if kind == "cut" and num_workers == 0:
        assert len(store.waits) == TRIES - 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "cut") for name in ("dataset.yaml", "train.jsonl", "train.jsonl.idx", ".info.json", "index.sqlite")),
        *(("index.sqlite", kind) for kind in ("reset", "503")),
    ],
)
def test_opening(store: Store, make_loader: Load, name: str, kind: str):
    """One lost connection goes unnoticed; a store that stays away is an error that names the file."""
    fault = Fault(f"/{name}", kind, 1)
    store.proxy.faults.append(fault)
    assert sum(len(row.keys) for row in read_pass(make_loader(store.remote))) == ROWS - 1
    assert fault.left == 0
    shutil.rmtree(local_copy.LOCAL_COPY_TMP_DIR)
    fault.left = 10**6
    with pytest.raises(DataError, match=rf"remote.yaml: cannot open split 'train': .*{name}.*Object stores"):
        make_loader(store.remote)


def test_a_server_that_is_not_there(store: Store, make_loader: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = json.loads((tmp_path / "msc.yaml").read_text())
    config["profiles"]["store"]["storage_provider"]["options"]["endpoint_url"] = "http://127.0.0.1:9"
    (tmp_path / "msc.yaml").write_text(json.dumps(config))
    _reinitialize_after_fork()
    with pytest.raises(DataError, match=r"cannot open split 'train': RuntimeError: .*EndpointConnectionError.*Object"):
        make_loader(store.remote)
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "other.yaml"))
    (tmp_path / "other.yaml").write_text("profiles: {}\n")
    _reinitialize_after_fork()
    with pytest.raises(DataError, match=r"cannot open split 'train': .*store"):
        make_loader(store.remote)


def test_files_that_are_not_there(store: Store, make_loader: Load):
    """An entry that no shard has is a bad sample; a shard or an index that is gone is not."""
    key = "sets/set/train.jsonl"
    lines = (store.local / "train.jsonl").read_text().replace('"00000003.jpg"', '"9.jpg"', 1)
    lines = lines.replace('"00000004.jpg"', '"nosuffix"', 1)
    (store.local / "train.jsonl").write_text(lines)
    source.CrudeJsonlDatasetFactory.prepare_dataset(source.EPath(store.local / "train.jsonl"))
    for suffix in ("", ".idx"):
        store.client.upload_file(f"{store.local}/train.jsonl{suffix}", BUCKET, f"{key}{suffix}")
    loader = make_loader(store.remote)
    rows = read_pass(loader)
    assert {skip.key: skip.reason for row in rows for skip in row.skipped} == {
        "s3": "missing_file",
        "s4": "missing_file",
        "s5": "corrupt_image",
    }
    shard = store.client.get_object(Bucket=BUCKET, Key="sets/set/shards/shard-000002.tar")["Body"].read()
    store.client.put_object(Bucket=BUCKET, Key="sets/set/shards/shard-000002.tar", Body=shard[:1000])
    with pytest.raises(DataError, match=r"cannot read entry .*shard-000002.tar: (found \d+ bytes, the index|.*416)"):
        read_pass(make_loader(store.remote))
    store.client.delete_object(Bucket=BUCKET, Key="sets/set/shards/shard-000002.tar")
    with pytest.raises(DataError, match=r"shard-000002.tar: the index names this shard, but it is not there"):
        read_pass(make_loader(store.remote))
    store.client.delete_object(Bucket=BUCKET, Key="sets/set/shards/.nv-meta/index.sqlite")
    with pytest.raises(DataError, match=r"cannot open split 'train': AssertionError: .*not prepared"):
        make_loader(store.remote)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_single_objects(store: Store, make_loader: Load, num_workers: int, tmp_path: Path):
    """Images as objects of their own; names cannot leave the prefix."""
    names = {"s1": "images/1.jpg", "s2": "gone.jpg", "s3": "msc://store/images/3.jpg", "s4": "../images/4.jpg"}
    names |= {"s5": "empty.jpg", "s6": "sub"}
    store.client.put_object(Bucket=BUCKET, Key="plain/empty.jpg", Body=b"")
    store.client.put_object(Bucket=BUCKET, Key="plain/sub/x.jpg", Body=b"")
    store.client.put_object(Bucket=BUCKET, Key="plain/images/1.jpg", Body=jpeg(1))
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A"}]
    rows = [{"id": key, "messages": turns, "media": {"image": [name]}} for key, name in names.items()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source.CrudeJsonlDatasetFactory.prepare_dataset(source.EPath(tmp_path / "own.jsonl"))
    blend = tmp_path / "own.yaml"
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    path: own.jsonl\n    aux:\n"
    blend.write_text(f"{head}      image: filesystem+msc://store/plain\n")
    loader = make_loader(blend, num_workers=num_workers)
    got = read_pass(loader)
    assert [key for row in got for key in row.keys] == ["s1"]
    assert {skip.key: skip.reason for row in got for skip in row.skipped} == {
        **dict.fromkeys(("s2", "s3", "s6"), "missing_file"),
        "s4": "outside_root",
        "s5": "corrupt_image",
    }
    store.proxy.faults.append(Fault("images/1.jpg", "cut", 10**6))
    with pytest.raises(DataError, match=r"cannot read 'images/1.jpg' from msc://store/plain: RetryableError"):
        read_pass(make_loader(blend, num_workers=num_workers))
    blend.write_text(f"{head}      image: filesystem+msc://store/plane\n")
    with pytest.raises(DataError, match=r"media folder msc://store/plane does not exist"):
        make_loader(blend)
