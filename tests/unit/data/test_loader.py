"""RowLoader: each sample once a pass, exact restore, skips counted, refusals."""

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3_vlm.config.schema import DataConfig, OnError
from qwen3_vlm.data import loader as loader_module
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.order import Share
from qwen3_vlm.data.prepare import Form
from qwen3_vlm.data.sample import PackedRow
from qwen3_vlm.data.source import train_samples
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.errors import ConfigError, DataError
from qwen3_vlm.modality.base import Modality
from qwen3_vlm.modality.registry import build_modalities
from tests.unit.data.cases import ToneModality, good_rows, image_config, jpeg, make_tokenizer, read_pass, row

Make = Callable[..., Path]
Load = Callable[..., RowLoader]


def keys(rows: list[PackedRow]) -> list[str]:
    return [key for packed in rows for key in packed.keys]


def skips(rows: list[PackedRow]) -> dict[str, str]:
    return {skipped.key: skipped.reason for packed in rows for skipped in packed.skipped}


def assert_equal(a: PackedRow, b: PackedRow) -> None:
    assert a.keys == b.keys and a.skipped == b.skipped
    for name in ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in a.media:
        assert torch.equal(a.media[name].data, b.media[name].data)
        assert torch.equal(a.media[name].positions, b.media[name].positions)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_each_sample_once_a_pass(make_data: Make, make_loader: Load, dp_size: int, num_workers: int, form: Form):
    path = make_data(good_rows(31), form=form)
    orders = []
    loaders = [make_loader(path, dp_rank=rank, dp_size=dp_size, num_workers=num_workers) for rank in range(dp_size)]
    for _ in range(2 if num_workers == 0 else 1):
        seen = [key for loader in loaders for key in keys(read_pass(loader))]
        assert sorted(seen) == sorted(f"s{i}" for i in range(31))
        orders.append(seen)
    assert len(orders) == 1 or orders[0] != orders[1]


def test_more_workers_than_samples(make_data: Make, make_loader: Load):
    path = make_data(good_rows(3))
    seen = [
        key for rank in range(2) for key in keys(read_pass(make_loader(path, dp_rank=rank, dp_size=2, num_workers=2)))
    ]
    assert sorted(seen) == ["s0", "s1", "s2"]


def test_order_follows_the_seed_and_validation_the_file(make_data: Make, make_loader: Load):
    path = make_data(good_rows(20))
    first = keys(read_pass(make_loader(path)))
    assert first == keys(read_pass(make_loader(path)))
    assert first != keys(read_pass(make_loader(path, seed=8)))
    spec = (path / "dataset.yaml").read_text()
    (path / "dataset.yaml").write_text(spec + spec.split("splits:\n")[1].replace("train:", "val:"))
    in_file_order = make_loader(path, split="val", pack=False)
    assert keys(read_pass(in_file_order)) == [f"s{i}" for i in range(20)]


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_whole_documents(make_data: Make, make_loader: Load, pack: bool):
    rows = read_pass(make_loader(make_data(good_rows(23)), pack=pack))
    assert all(packed.input_ids.shape == (64,) for packed in rows)
    per_row = [len(packed.keys) for packed in rows]
    assert (max(per_row) > 1) if pack else (per_row == [1] * 23)


def steps_of(loader: RowLoader, count: int | None = None) -> list[list[PackedRow] | None]:
    """The next steps, to the end of two passes if no number is given; None where a pass ends."""
    steps: list[list[PackedRow] | None] = []
    while loader.epoch < 2 and (count is None or len(steps) < count):
        steps.append(loader.next_rows())
    return steps


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restore_is_exact(make_data: Make, make_loader: Load, num_workers: int):
    """At every step of two passes (two workers: at some), pixels and skips included."""
    path = make_data(good_rows(27), images={"s3.jpg": b"broken"})
    straight = make_loader(path, num_workers=num_workers, global_batch_size=2)
    expected, states = [], []
    while straight.epoch < 2:
        states.append(as_saved(straight.state_dict()))
        expected.append(straight.next_rows())
    first_pass = expected.index(None) + 1
    for at in range(len(expected)) if num_workers == 0 else [first_pass - 2, first_pass - 1, first_pass + 3]:
        restored = make_loader(path, num_workers=num_workers, global_batch_size=2)
        restored.load_state_dict(states[at])
        for want, got in zip(expected[at:], steps_of(restored), strict=True):
            assert (got is None) == (want is None)
            for one, other in zip(got or [], want or [], strict=True):
                assert_equal(one, other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restore_after_every_step(make_data: Make, make_loader: Load, num_workers: int):
    """Killed and restored after each single step: positions do not drift."""
    path = make_data(good_rows(6))
    expected = keys(read_pass(make_loader(path, num_workers=num_workers)))
    got, state = [], None
    while True:
        loader = make_loader(path, num_workers=num_workers)
        if state is not None:
            loader.load_state_dict(state)
        step = loader.next_rows()
        if step is None:
            break
        got += keys(step)
        state = as_saved(loader.state_dict())
        loader.close()
    assert got == expected


def as_saved(state: dict) -> dict:
    return json.loads(json.dumps(state))


def test_rows_of_a_step_do_not_depend_on_ranks_or_workers(make_data: Make, make_loader: Load):
    """Every layout gives each step the same rows; every rank has as many, but at the end of a pass."""
    path = make_data(good_rows(50))
    expected = steps_of(make_loader(path, global_batch_size=8))
    assert len(expected) > 6
    for dp_size, num_workers in [(1, 1), (2, 0), (2, 1), (4, 0), (8, 0)]:
        shape = {"global_batch_size": 8, "dp_size": dp_size, "num_workers": num_workers}
        ranks = [steps_of(make_loader(path, dp_rank=rank, **shape)) for rank in range(dp_size)]
        for want, *parts in zip(expected, *ranks, strict=True):
            if want is None:
                assert parts == [None] * dp_size
                continue
            assert max(map(len, parts)) == -(-len(want) // dp_size)
            dealt = [packed for part in parts for packed in part or []]
            for got, wanted in zip(sorted(dealt, key=keys_of), sorted(want, key=keys_of), strict=True):
                assert_equal(got, wanted)


def keys_of(packed: PackedRow) -> list[str]:
    return packed.keys


@pytest.mark.parametrize("form", Form)
def test_resume_with_other_ranks_workers_and_batches(make_data: Make, make_loader: Load, form: Form):
    """In the middle of a pass DP 2 -> 1 -> 4, and with other batch sizes and workers: the rows, step by step."""
    rows = [*good_rows(60), row("gone"), row("nosuffix", images=["s1"])]
    path = make_data(rows, images={"s7.jpg": b"broken"}, form=form)
    expected = [found(packed) for packed in read_pass(make_loader(path))]
    got = []
    state = None
    for dp_size, batch, num_workers, steps in [(2, 4, 0, 2), (1, 4, 2, 1), (4, 4, 0, 1), (1, 3, 1, None)]:
        shape = {"global_batch_size": batch, "dp_size": dp_size, "num_workers": num_workers}
        ranks = [make_loader(path, dp_rank=rank, **shape) for rank in range(dp_size)]
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        while steps is None or steps > 0:
            parts = [loader.next_rows() for loader in ranks]
            if None in parts:
                assert parts == [None] * dp_size
                break
            got.append(sorted(found(packed) for part in parts for packed in part or []))
            steps = None if steps is None else steps - 1
        states = [as_saved(loader.state_dict()) for loader in ranks]
        state = states[0]
        assert all(other == state for other in states)
    in_order = iter(expected)
    assert got == [sorted(islice(in_order, len(step))) for step in got] and next(in_order, None) is None
    seen = Counter(key for step in got for kept, skipped, _ in step for key in [*kept, *skipped])
    assert seen == Counter(row["id"] for row in rows), "every key once"
    reasons = {key: reason for step in got for _, skipped, _ in step for key, reason in skipped.items()}
    assert reasons == {"s7": "corrupt_image", "gone": "missing_file", "nosuffix": "missing_file"}


def found(packed: PackedRow) -> tuple[list[str], dict[str, str], float]:
    """What a row holds: keys, skips, and a number that its pixels give."""
    return packed.keys, skips([packed]), float(packed.media["image"].data.double().sum())


def test_ranks_share_the_measuring(
    make_data: Make, tokenizer: ChatTokenizer, modalities: dict[str, Modality], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loader_module, "SAMPLES_PER_CHUNK", 4)
    path = make_data(good_rows(30))
    common = {
        "config": DataConfig(path=str(path), num_workers=0),
        "seq_length": 64,
        "modalities": modalities,
        "tokenizer": tokenizer,
        "seed": 7,
    }
    sizes = RowLoader(**common).sizes
    assert (sizes.tokens > 0).all() and set(sizes.items) == {0, 1}
    whole = np.stack([sizes.tokens, sizes.items], axis=1)
    chunks = np.split(whole, range(4, 30, 4))
    parts = [np.concatenate(chunks[rank::3]) for rank in range(3)]
    for rank in range(3):
        seen = []

        def gather(mine: np.ndarray, seen: list[np.ndarray] = seen) -> list[np.ndarray]:
            seen.append(mine)
            return [np.zeros((1, 2))] * 3 if len(seen) == 1 else parts

        loader = RowLoader(**common, share=Share(dp_rank=rank, dp_size=3), gather=gather)
        assert np.array_equal(seen[1], parts[rank])
        assert np.array_equal(loader.sizes.tokens, sizes.tokens) and np.array_equal(loader.sizes.items, sizes.items)


def test_sizes_are_kept_for_the_next_start(
    make_data: Make, make_loader: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Not for other files, another tokenizer or other lengths; and not if one of the ranks lacks them."""
    path, cache = make_data(good_rows(9)), tmp_path / "sizes.npz"
    expected = make_loader(path, cache=cache).sizes.tokens
    reads = []
    read = loader_module.SampleSource.read
    monkeypatch.setattr(
        loader_module.SampleSource, "read", lambda self, numbers: reads.append(1) or read(self, numbers)
    )

    def starts_with_measuring(**options: object) -> bool:
        reads.clear()
        assert np.array_equal(make_loader(path, cache=cache, **options).sizes.tokens > 0, expected > 0)
        return bool(reads)

    assert not starts_with_measuring()
    assert not starts_with_measuring(num_workers=0, packing_buffer_size=3)
    assert starts_with_measuring(seq_length=65) and starts_with_measuring() and not starts_with_measuring()
    (path / "train.jsonl").touch()
    assert starts_with_measuring() and not starts_with_measuring()
    cache.write_bytes(cache.read_bytes()[:100])
    assert starts_with_measuring() and not starts_with_measuring()
    lacking = np.array([[0, 0]])
    whole = np.stack([expected, np.array([1, 1, 1, 1, 0] * 2)[:9]], axis=1)
    answers = iter([[lacking, np.array([[1, 0]])], [whole, whole[:0]]])
    assert starts_with_measuring(dp_size=2, dp_rank=0, gather=lambda _: next(answers))


def test_a_file_that_changes_while_it_is_read(make_data: Make, make_loader: Load):
    path = make_data(good_rows(4))
    loader = make_loader(path)
    lines = (path / "train.jsonl").read_text()
    (path / "train.jsonl").write_text(lines.replace("A cat", "0#2#4"))  # as many bytes
    with pytest.raises(DataError, match=r"has \d+ tokens, it had \d+ when the run started: its file was changed"):
        read_pass(loader)


@pytest.mark.parametrize(
    "change",
    [
        {"packing_buffer_size": 9},
        {"seq_length": 65},
        {"pack": False},
        {"seed": 8},
    ],
)
def test_restore_refuses_another_stream(make_data: Make, make_loader: Load, change: dict):
    path = make_data(good_rows(6))
    state = make_loader(path).state_dict()
    with pytest.raises(ConfigError, match=f"{next(iter(change))} was .*, is "):
        make_loader(path, **change).load_state_dict(state)


def test_restore_refuses_other_data(make_data: Make, make_loader: Load):
    state = make_loader(make_data(good_rows(6))).state_dict()
    with pytest.raises(ConfigError, match=r"cannot resume in pass 1, behind row 0: .* data was"):
        make_loader(make_data(good_rows(7))).load_state_dict(state)


def bad_rows() -> tuple[list[dict | str], dict[str, str]]:
    """Ten good rows and one of each fault, with the reasons by key."""
    rows: list[dict | str] = good_rows(10)
    faults = {
        "corrupt": (row("corrupt"), "corrupt_image"),
        "truncated": (row("truncated"), "corrupt_image"),
        "gone": (row("gone"), "missing_file"),
        "too_many": (row("too_many", "<image> <image>", images=["s0.jpg"]), "placeholder_mismatch"),
        "too_few": (row("too_few", "Hello", images=["s0.jpg"]), "placeholder_mismatch"),
        "empty": ({"id": "empty", "messages": [], "media": {}}, "empty_conversation"),
        "unanswered": ({"id": "unanswered", "messages": [{"role": "user", "content": "?"}]}, "empty_conversation"),
        "long": (row("long", answer="mat " * 200, images=["s0.jpg"]), "over_long"),
        "dotdot": (row("dotdot", images=["../secret.jpg"]), "outside_root"),
        "absolute": (row("absolute", images=["/etc/passwd"]), "outside_root"),
        "link": (row("link"), "outside_root"),
        "bomb": (row("bomb"), "image_too_large"),
        "role": (
            {"id": "role", "messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "bad_row",
        ),
        "shape": ({"id": "shape", "messages": "none"}, "bad_row"),
        "names": (row("names", images="s0.jpg"), "bad_row"),
        "surrogate": (row("surrogate", answer="\ud800", images=["s0.jpg"]), "bad_row"),
    }
    for key, (fault, _) in faults.items():
        rows.insert(len(rows) // 2, fault)
        assert fault["id"] == key
    rows.append("{not json}")
    return rows, {key: reason for key, (_, reason) in faults.items()} | {f"train.jsonl:{len(rows) - 1}": "bad_row"}


def bad_files() -> dict[str, bytes]:
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    return {"corrupt.jpg": b"not an image", "truncated.jpg": jpeg(3, (200, 200))[:600], "bomb.jpg": bomb.getvalue()}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pack", [True, False])
def test_bad_samples_are_counted_by_reason(make_data: Make, make_loader: Load, num_workers: int, pack: bool):
    rows, reasons = bad_rows()
    path = make_data(rows, images=bad_files())
    (path / "secret.jpg").write_bytes(jpeg(1))
    (path / "images" / "link.jpg").symlink_to(path / "secret.jpg")
    packed = read_pass(make_loader(path, num_workers=num_workers, pack=pack))
    assert skips(packed) == reasons
    assert sorted(keys(packed)) == sorted(f"s{i}" for i in range(10))
    assert sum(len(r.skipped) for r in packed) == len(reasons), "each is counted once"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("key", ["s2", "empty"])
def test_on_error_raise_names_the_sample(make_data: Make, make_loader: Load, num_workers: int, key: str):
    bad = {"id": "empty", "messages": []} if key == "empty" else row("s2")
    rows = [row("s0"), row("s1"), bad]
    path = make_data(rows, images={"s2.jpg": b"broken"})
    with pytest.raises(DataError, match=f"sample '{key}': (corrupt_image|empty_conversation): .*on_error=raise"):
        read_pass(make_loader(path, num_workers=num_workers, on_error=OnError.raise_))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_stop_the_run(
    make_data: Make,
    make_loader: Load,
    monkeypatch: pytest.MonkeyPatch,
    modalities: dict[str, Modality],
    num_workers: int,
):
    monkeypatch.setattr(type(modalities["image"]), "preprocess", lambda self, raw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_pass(make_loader(make_data(good_rows(3)), num_workers=num_workers))


def test_a_row_of_skips_alone_is_padding(make_data: Make, make_loader: Load):
    (packed,) = read_pass(make_loader(make_data([row("gone")])))
    assert skips([packed]) == {"gone": "missing_file"} and packed.keys == []
    assert packed.cu_seqlens.tolist() == [0, 64] and packed.loss_mask.sum() == 0


def test_swapped_images_change_their_rows_alone(make_data: Make, make_loader: Load):
    """k-th placeholder = images[k]."""
    question = "<image> then <image>"
    straight = [row("a", question, images=["s0.jpg", "s1.jpg"]), row("b", question, images=["s0.jpg", "s0.jpg"])]
    swapped = [row("a", question, images=["s1.jpg", "s0.jpg"]), straight[1]]
    one, two = (read_pass(make_loader(make_data(rows)))[0] for rows in (straight, swapped))
    assert torch.equal(one.input_ids, two.input_ids) and one.keys == two.keys
    first = 2 * one.keys.index("a")
    data = two.media["image"].data.clone()
    data[[first, first + 1]] = data[[first + 1, first]]
    assert not torch.equal(one.media["image"].data, two.media["image"].data)
    assert torch.equal(one.media["image"].data, data)


def test_second_modality(make_data: Make, make_loader: Load, two_modalities: dict[str, Modality], tmp_path: Path):
    """Nothing in data/ knows which modality it has: tones ride beside images, bad ones are counted alike."""
    tones = tmp_path / "tones"
    tones.mkdir()
    (tones / "a.raw").write_bytes(bytes([1, 2, 3, 4, 5]))
    (tones / "short.raw").write_bytes(b"12")
    media = {"image": ["s0.jpg"], "tone": ["a.raw"]}
    good = row("both", "<tone> and <image>?") | {"media": media}
    rows = [good, row("bad", "<tone>") | {"media": {"tone": ["short.raw"]}}, row("count", "<tone>", images=[])]
    path = make_data(rows, stores={"image": tmp_path / "data" / "images", "tone": tones})
    packed = read_pass(make_loader(path, mods=two_modalities))
    assert skips(packed) == {"bad": "corrupt_tone", "count": "placeholder_mismatch"}
    (held,) = [packed_row for packed_row in packed if packed_row.keys]
    assert held.media["tone"].data.tolist() == [[1, 2, 3, 4, 5]]
    assert held.media["tone"].positions.numel() == ToneModality(two_modalities["tone"].config).num_tokens == 3
    assert held.media["image"].data.shape == (1, 3, 16, 16) and held.media["image"].positions.numel() == 2


def test_media_of_a_modality_that_the_run_lacks(make_data: Make, make_loader: Load):
    rows = [row("s0") | {"media": {"image": ["s0.jpg"], "tone": ["a.raw"]}}]
    (packed,) = read_pass(make_loader(make_data(rows)))
    assert packed.skipped[0].reason == "bad_row" and "modalities are: image" in packed.skipped[0].detail


def test_blend_with_repetitions_and_refusal_of_weights(make_data: Make, make_loader: Load, tmp_path: Path):
    path = make_data(good_rows(9))
    leaf = f"path: {path}/train.jsonl\n        aux:\n          image: filesystem://{path}/images\n"
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
    blend = tmp_path / "blend.yaml"
    blend.write_text(f"{head}    blend_epochized:\n      - repetitions: 2\n        {leaf}      - {leaf}")
    assert train_samples(str(blend)) == 27
    expected = read_pass(make_loader(blend))
    assert Counter(keys(expected)) == {f"s{i}": 3 for i in range(9)}
    for at in range(0, len(expected), 4):
        loader = make_loader(blend)
        steps_of(loader, at)
        restored = make_loader(blend)
        restored.load_state_dict(loader.state_dict())
        assert keys(read_pass(restored)) == keys(expected[at:])
    blend.write_text(f"{head}    blend:\n      - weight: 2\n        {leaf}      - {leaf}")
    with pytest.raises(DataError, match=r"weighted blend.*blend_epochized"):
        make_loader(blend)


def test_train_samples(make_data: Make):
    path = make_data(good_rows(9))
    assert train_samples(str(path)) == train_samples(str(path / "dataset.yaml")) == 9


def test_refusals_of_data(make_data: Make, make_loader: Load, tmp_path: Path):
    with pytest.raises(DataError, match=r"neither a prepared folder nor a metadataset"):
        make_loader(tmp_path / "nothing")
    path = make_data(good_rows(2))
    with pytest.raises(DataError, match=r"cannot open split 'val'"):
        make_loader(path, split="val")
    (path / "report.json").rename(tmp_path / "report.json")
    with pytest.raises(DataError, match=r"preparation did not finish"):
        make_loader(path)
    (tmp_path / "report.json").rename(path / "report.json")
    (path / "images").rename(path / "moved")
    with pytest.raises(DataError, match=r"media folder .*images does not exist"):
        make_loader(path)


def test_refusal_of_another_tokenizer_and_item_length(
    make_data: Make, make_loader: Load, tmp_path: Path, tokenizer_folder: Path
):
    path = make_data(good_rows(2))
    state = make_loader(path).state_dict()
    longer = build_modalities({"image": image_config(num_tokens=5)})
    with pytest.raises(ConfigError, match=r"tokens_per_item was .*4.*, is .*5"):
        make_loader(path, mods=longer).load_state_dict(state)
    folder = tmp_path / "other"
    folder.mkdir()
    make_tokenizer(folder, without="<|tone_end|>")
    assert ChatTokenizer.from_folder(folder, {}).fingerprint != state["stream"]["tokenizer"]
    assert json.dumps(state["stream"])
