"""runs/demo/report.html: what was trained, what the model saw, and what it answers."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

matplotlib.use("agg")
from matplotlib import pyplot as plt

from qwen3_vlm.checkpoint import layout
from qwen3_vlm.config.schema import DataConfig
from qwen3_vlm.data.inspect import draw_row
from qwen3_vlm.data.loader import RowLoader
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.eval.exact_match import Answered, Question
from qwen3_vlm.eval.report import STYLE, answer_cards
from qwen3_vlm.modality.image import png_tag
from qwen3_vlm.modality.registry import build_modalities

SHOWN_ANSWERS = 20

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>qwen3_vlm demo</title>{{ style }}
<h1>A tiny Qwen3 learns to see</h1>
<p>A frozen SigLIP tower and a frozen Qwen3 decoder, both small stand-ins for the public weights, are joined by a fresh
resampler and projector. Only those train, at tensor-parallel size 2, on pictures that were drawn for this run; the
pictures below were held out. Whole demo: {{ "%.0f"|format(summary.seconds) }} s.</p>
<table><tr><th>stage</th><th>steps</th><th>first loss</th><th>last loss</th><th>seconds</th><th>exact match</th></tr> {%
for name, s in summary.stages.items() %}<tr><td>{{ name }}</td><td>{{ s.steps }}</td><td>{{ "%.3f"|format(s.loss_first)
}}</td> <td>{{ "%.4f"|format(s.loss_last) }}</td><td>{{ "%.0f"|format(s.seconds) }}</td><td>{{
"%.3f"|format(s.exact_match) }}</td></tr> {% endfor %}</table> <table>{% for name, e in summary.eval.items() %}
<tr><th>held-out questions ({{ name }} image)</th><td>{{ e.n }}</td></tr> <tr><th>exact match</th><td><b>{{
"%.3f"|format(e.exact_match) }}</b></td></tr> <tr><th>with another question's image</th><td>{{
"%.3f"|format(e.exact_match_images_shuffled) }}</td></tr> <tr><th>best constant answer per question</th><td>{{
"%.3f"|format(e.chance) }}</td></tr> <tr><th>before training</th><td>{{ "%.3f"|format(e.exact_match_before)
}}</td></tr>{% endfor %}</table> <h2>Loss</h2>{{ curves }} <h2>Answers on held-out images</h2>{{ answers }}
<h2>One packed row of stage 1, as the model sees it</h2>
<p>Every colour is a document that sees no other; yellow tokens count in the loss; each picture stands where its visual
tokens stand.</p>{{ row }}</html>"""
)


def _curves(out: Path, stages: list[str]) -> Markup:
    figure, axes = plt.subplots(1, len(stages), figsize=(4.8 * len(stages), 3.0), layout="constrained", squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        steps = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        axis.plot([s["step"] for s in steps], [s["loss"] for s in steps], linewidth=1.2)
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return png_tag(Image.open(buffer))


def _packed_row(out: Path, stage: str, seq_length: int) -> Markup:
    checkpoint = out / "import"
    modalities = build_modalities(layout.read_architecture(checkpoint).modality)
    tokenizer = ChatTokenizer.from_folder(checkpoint / layout.PROCESSOR, modalities)
    loader = RowLoader(
        DataConfig(path=str(out / "data" / stage), num_workers=0),
        seq_length=seq_length,
        modalities=modalities,
        tokenizer=tokenizer,
        seed=0,
    )
    rows = loader.next_rows()
    assert rows
    return draw_row(rows[0], tokenizer, modalities)


def _answers(file: Path) -> Markup:
    rows: list[dict[str, Any]] = json.loads(file.read_text())["answers"][:SHOWN_ANSWERS]
    answered = [
        Answered(
            question=Question(images=tuple(map(Path, r["images"])), question=r["question"], answer=r["answer"]),
            said=r["said"],
            said_with_other_images=r["said_with_other_images"],
        )
        for r in rows
    ]
    return answer_cards(answered)


def write_report(out: Path, summary: dict[str, Any]) -> None:
    """Write report.html.

    Args:
        out: the demo's folder, all stages done.
        summary: what summary.json holds.
    """
    stages = list(summary["stages"])
    page = _PAGE.render(
        style=STYLE,
        summary=summary,
        curves=_curves(out, stages),
        row=_packed_row(out, stages[-1], seq_length=512),
        answers=_answers(out / "eval" / f"{stages[-1]}.json"),
    )
    (out / "report.html").write_text(page)
