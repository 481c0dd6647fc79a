"""Pages for people: scores, and images with prompt, answer and truth."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from qwen3_vlm.eval.exact_match import Answered, ExactMatch
from qwen3_vlm.modality.image import png_tag

THUMBNAIL_PX = 144

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

STYLE = Markup(
    "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1c1c22}"
    "h1,h2{font-weight:600}table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ddd;padding:.35em .7em;"
    "text-align:left;vertical-align:top}th{background:#f5f5f8}code{background:#f5f5f8;padding:0 .2em}"
    ".right{color:#11743b}.wrong{color:#b3261e}.cards{display:flex;flex-wrap:wrap;gap:10px}"
    ".card{border:1px solid #ddd;border-radius:6px;padding:8px;width:188px}.pictures{min-height:150px}"
    ".prompt,.truth{color:#666;font-size:12px}img{max-width:100%;vertical-align:middle;margin:2px;border-radius:3px}</style>"
)

_ANSWERS = _ENVIRONMENT.from_string(
    """<div class="cards">
{% for a in answered %}<div class="card"><div class="pictures">{% for p in a.question.images %}{{ thumbnail(p) }}
{% endfor %}</div>
<div class="prompt">{{ a.question.question }}</div>
<div><b class="{{ 'right' if a.is_right else 'wrong' }}">{{ a.said }}</b></div>
<div class="truth">truth: {{ a.question.answer }}</div></div>
{% endfor %}</div>"""
)

_PAGE = _ENVIRONMENT.from_string(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>{{ style }}
<h1>{{ title }}</h1>
<table><tr><th>questions</th><td>{{ score.n }}</td></tr>
<tr><th>exact match</th><td>{{ "%.3f"|format(score.exact_match) }}</td></tr>
<tr><th>with the images of other questions</th><td>{{ "%.3f"|format(score.exact_match_images_shuffled) }}</td></tr>
<tr><th>best constant answer per question</th><td>{{ "%.3f"|format(score.chance) }}</td></tr></table>
{{ answers }}</html>"""
)


def thumbnail(path: Path) -> Markup:
    """An <img> that holds its picture, at most THUMBNAIL_PX a side."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return png_tag(small)


def answer_cards(answered: Sequence[Answered]) -> Markup:
    """A card for each question: its images, prompt, answer and truth."""
    return Markup(_ANSWERS.render(answered=answered, thumbnail=thumbnail))


def evaluation_page(title: str, score: ExactMatch, answered: Sequence[Answered]) -> str:
    """The page that tools/evaluate.py writes."""
    return _PAGE.render(title=title, style=STYLE, score=score, answers=answer_cards(answered))
