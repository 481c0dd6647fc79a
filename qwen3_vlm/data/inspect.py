"""What the model will see, as HTML: a packed row with its documents, loss tokens, decoded text and media in their
places.
"""

from collections.abc import Mapping
from itertools import groupby, pairwise

from markupsafe import Markup, escape

from qwen3_vlm.data.sample import PackedRow
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
