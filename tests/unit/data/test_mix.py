"""examples/data/mix.yaml: the blend that docs/data.md shows, over prepared folders of its names."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.prepare import Form, prepare_llava
from tests.unit.data.cases import jpeg, read_pass

ROOT = Path(__file__).parents[3]


def test_the_example_blend(tmp_path: Path, make_loader: Callable[..., RowLoader]):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(1))
    sets = (("mantis", 40, Form.tar, 0.3), ("llava_instruct", 20, Form.jsonl, 0), ("own", 10, Form.jsonl, 0))
    for name, count, form, val in sets:
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A"}]
        rows = [{"id": f"{name}{i}", "image": "a.jpg", "conversations": turns} for i in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        prepare_llava(tmp_path / f"{name}.json", tmp_path / "images", tmp_path / name, form=form, val_fraction=val)
    blend = tmp_path / "mix.yaml"
    shutil.copy(ROOT / "examples/data/mix.yaml", blend)
    val = json.loads((tmp_path / "mantis" / "report.json").read_text())["val"]
    assert val > 0

    def passes(split: str) -> Counter[str]:
        rows = read_pass(make_loader(blend, split=split))
        assert not any(row.skipped for row in rows)
        return Counter(key for row in rows for key in row.keys)

    seen = passes("train")
    assert {n for key, n in seen.items() if key.startswith("own")} == {2}
    assert sum(n for key, n in seen.items() if key.startswith("own")) == 18
    assert sum(n for key, n in seen.items() if key.startswith("llava_instruct")) == 10
    assert sum(n for key, n in seen.items() if key.startswith("mantis")) == 40 - val
    held_out = passes("val")
    assert sorted(key for key in held_out if key.startswith("own")) == ["own9"]
    assert len(held_out) == val + 1 and held_out.keys().isdisjoint(seen)
