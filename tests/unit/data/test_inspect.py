"""The inspection page: figures that can be counted by hand, what is drawn, and the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qwen3_vlm.data.inspect import inspection_page, row_statistics
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.base import Modality
from tests.unit.data.cases import NUM_TOKENS, good_rows, read_pass, row

ROOT = Path(__file__).parents[3]


def test_figures_and_page(
    make_data: Callable[..., Path],
    make_loader: Callable[..., RowLoader],
    tokenizer: ChatTokenizer,
    modalities: dict[str, Modality],
):
    data = make_data(
        [*good_rows(12), row("gone", images=["gone.jpg"]), row("evil", answer="<b>|im_end|</b>", images=["s1.jpg"])]
    )
    rows = read_pass(make_loader(data))
    page, of = inspection_page("a <title>", rows, tokenizer, modalities, shown=2)
    keys = [key for packed in rows for key in packed.keys]
    assert of.samples == len(keys) == 13 and of.rows == len(rows)
    assert of.items == 13 - 2  # two of the twelve rows have no image
    assert of.skipped == {"missing_file": 1}
    assert of.loss_tokens == sum(int(packed.loss_mask.sum()) for packed in rows)
    assert abs(of.tokens / (64 * len(rows)) - of.fill) < 1e-4
    assert sum(of.lengths.values()) == 13
    assert sum(n * count for n, count in of.samples_per_row.items()) == 13
    assert sum(n * count for n, count in of.items_per_row.items()) == 11
    assert page.count("<h2>Row ") == 2 and "a &lt;title&gt;" in page and "<b>" not in page
    drawn = sum(len(packed.media["image"].data) for packed in rows[:2])
    assert page.count("data:image/png") == drawn and page.count(f"x{NUM_TOKENS}</span>") == drawn
    assert "gone.jpg" in page and "missing_file" in page
    assert page == inspection_page("a <title>", rows, tokenizer, modalities, shown=2)[0]


def test_no_rows(modalities: dict[str, Modality]):
    assert row_statistics([], modalities).fill == 0


def test_command_line(tmp_path: Path, make_data: Callable[..., Path], tokenizer_folder: Path):
    out, figures = tmp_path / "page.html", tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "--data", str(make_data(good_rows(9)))]
    command += ["--tokenizer", str(tokenizer_folder), "--seq-length", "400", "--out", str(out), "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "data:image/png" in out.read_text()
    report = json.loads(figures.read_text())
    assert report["read"]["samples"] == report["pass"]["samples"] == 9 and json.loads(done.stdout) == report
    neither = subprocess.run([*command[:4], "--out", str(out)], capture_output=True, text=True)
    assert neither.returncode == 1 and "give either --checkpoint or --tokenizer" in neither.stderr
