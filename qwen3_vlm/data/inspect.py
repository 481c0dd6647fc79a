"""What the model will see, as HTML: packed rows with their documents, loss tokens, decoded text and media in their
places, and figures of all rows that were read for the page.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from jinja2 import Environment
from markupsafe import Markup, escape

from qwen3_vlm.data.sample import PackedRow, SkippedSample
from qwen3_vlm.data.tokenizer import ChatTokenizer
from qwen3_vlm.modality.base import Modality

ROW_STYLE = Markup(
    "<style>.row{line-height:1.9;font-family:ui-monospace,monospace;font-size:13px}.doc{"
    "border-radius:4px;padding:2px 3px;"
    "margin-right:3px;white-space:pre-wrap}.doc0{background:#eef3fb}.doc1{background:#f4f0e6}.doc2{background:#ecf5ee}"
    ".loss{background:#ffd54a;border-radius:2px}.pad{color:#999}.item{color:#666;font-size:11px}</style>"
)


def draw_row(row: PackedRow, tokenizer: ChatTokenizer, modalities: Mapping[str, Modality]) -> Markup:
    """Draw one packed row: a colour a document, tokens that count in the loss marked, each item's picture at its
    placeholders.

    Args:
        row: as the loader yields it.
        tokenizer: decodes it.
        modalities: draw their items.
    """
    owner: dict[int, tuple[str, int]] = {}
    for name, batch in row.media.items():
        k = modalities[name].num_tokens
        owner |= {p: (name, n // k) for n, p in enumerate(batch.positions.tolist())}
    bounds = row.cu_seqlens.tolist()
    documents = []
    for n, (start, end) in enumerate(pairwise(bounds)):
        if n >= len(row.keys):
            documents.append(Markup('<span class="doc pad">{} tokens of padding</span>').format(end - start))
            continue
        # The mask stands at the position that predicts: token p counts if position p - 1 of its document does.
        counts = [p > start and bool(row.loss_mask[p - 1]) for p in range(start, end)]
        spans = []
        for (item, is_loss), run in groupby(range(start, end), key=lambda p: (owner.get(p), counts[p - start])):
            positions = list(run)
            if item is not None:
                name, index = item
                picture = modalities[name].to_html(row.media[name].data[index])
                spans.append(Markup('{}<span class="item">x{}</span>').format(picture, len(positions)))
                continue
            text = escape(tokenizer.decode(row.input_ids[positions].tolist()))
            spans.append(Markup('<span class="loss">{}</span>').format(text) if is_loss else text)
        body = Markup("").join(spans)
        documents.append(Markup('<span class="doc doc{}" title="{}">{}</span>').format(n % 3, row.keys[n], body))
    return Markup('{}<div class="row">{}</div>').format(ROW_STYLE, Markup("").join(documents))


SHOWN_SKIPPED = 50


@dataclass(kw_only=True)
class RowStatistics:
    """Figures of the rows that were read."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    """Of the samples; the rest of the rows is padding."""
    loss_tokens: int = 0
    items: int = 0
    """Media items of all modalities."""
    fill: float = 0.0
    """Share of the rows' positions that hold tokens of samples."""
    samples_per_row: dict[int, int] = field(default_factory=dict)
    """Rows by samples."""
    items_per_row: dict[int, int] = field(default_factory=dict)
    """Rows by media items."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Samples by tokens; a bin a power of two."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples left out, by reason."""


def row_statistics(rows: Sequence[PackedRow], modalities: Mapping[str, Modality]) -> RowStatistics:
    """Count what rows hold."""
    of = RowStatistics(rows=len(rows))
    samples, items, lengths, skipped = Counter[int](), Counter[int](), Counter[int](), Counter[str]()
    for row in rows:
        own = [b - a for a, b in pairwise(row.cu_seqlens.tolist())][: len(row.keys)]
        lengths.update(length.bit_length() for length in own)
        num_items = sum(len(batch.positions) // modalities[name].num_tokens for name, batch in row.media.items())
        samples[len(own)] += 1
        items[num_items] += 1
        skipped.update(sample.reason for sample in row.skipped)
        of.samples += len(own)
        of.tokens += sum(own)
        of.loss_tokens += int(row.loss_mask.sum())
        of.items += num_items
    positions = sum(row.input_ids.numel() for row in rows)
    of.fill = round(of.tokens / max(1, positions), 4)
    of.samples_per_row, of.items_per_row = dict(sorted(samples.items())), dict(sorted(items.items()))
    of.lengths = {f"{1 << bits >> 1}-{(1 << bits) - 1}": n for bits, n in sorted(lengths.items())}
    of.skipped = dict(sorted(skipped.items()))
    return of


_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1c1c22}
h1,h2{font-weight:600}table{border-collapse:collapse;margin:1em 0;display:inline-table;margin-right:2em;
vertical-align:top}td,th{border:1px solid #ddd;padding:.25em .7em;text-align:left}th{background:#f5f5f8}
caption{text-align:left;color:#666}img{vertical-align:middle;margin:2px;border-radius:3px}
.bar{display:inline-block;height:.7em;background:#4a7ab5;margin-right:.5em}</style>
<h1>{{ title }}</h1>
<p>Every colour is a document that sees no other; yellow tokens count in the loss; each picture stands where its tokens
stand, as the encoder gets it.</p>
<table><caption>{{ of.rows }} rows were read</caption>
<tr><th>samples</th><td>{{ of.samples }}</td></tr><tr><th>their tokens</th><td>{{ of.tokens }}</td></tr>
<tr><th>of them loss tokens</th><td>{{ of.loss_tokens }}</td></tr><tr><th>media items</th><td>{{ of.items }}</td></tr>
<tr><th>fill</th><td>{{ "%.2f"|format(100 * of.fill) }}%</td></tr>
<tr><th>skipped samples</th><td>{{ of.skipped.values()|sum }}</td></tr></table>
{% for caption, counts in histograms.items() if counts %}<table><caption>{{ caption }}</caption>
{% for name, n in counts.items() %}<tr><th>{{ name }}</th><td>
<span class="bar" style="width:{{ 120 * n // (counts.values()|max) }}px"></span>{{ n }}</td></tr>
{% endfor %}</table>{% endfor %}
{% if skipped %}<h2>Skipped</h2><table><tr><th>key</th><th>reason</th><th>detail</th></tr>
{% for s in skipped %}<tr><td>{{ s.key }}</td><td>{{ s.reason }}</td><td>{{ s.detail }}</td></tr>
{% endfor %}</table>{% endif %}
{% for row in drawn %}<h2>Row {{ loop.index }}</h2>{{ row }}{% endfor %}</html>
"""
)


def inspection_page(
    title: str, rows: Sequence[PackedRow], tokenizer: ChatTokenizer, modalities: Mapping[str, Modality], *, shown: int
) -> tuple[str, RowStatistics]:
    """One page of packed rows.

    Args:
        title: of the page.
        rows: as the loader yields them; figures are of all of them.
        tokenizer: decodes them.
        modalities: draw their items.
        shown: rows that are drawn, from the first.

    Returns:
        The HTML, which needs no other file, and the figures.
    """
    of = row_statistics(rows, modalities)
    skipped: list[SkippedSample] = [sample for row in rows for sample in row.skipped]
    page = _PAGE.render(
        title=title,
        of=of,
        histograms={
            "samples by tokens": of.lengths,
            "rows by samples": of.samples_per_row,
            "rows by media items": of.items_per_row,
            "skipped by reason": of.skipped,
        },
        skipped=skipped[:SHOWN_SKIPPED],
        drawn=[draw_row(row, tokenizer, modalities) for row in rows[:shown]],
    )
    return page, of
