"""OUT/report.json and OUT/report.png: what was kept, what was dropped and why, histograms of length and images."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(kw_only=True)
class Histogram:
    """Rows by a whole number: 0, 1, 2-3, 4-7, ... (a bin a power of two), or one bin a number."""

    unit: str
    rows: dict[str, int] = field(default_factory=dict)
    """Kept rows by bin, in order."""
    mean: float = 0.0
    largest: int = 0

    @classmethod
    def of(cls, values: Mapping[int, int], *, unit: str, by_power: bool) -> "Histogram":
        """Build from {value: rows}."""
        bins: Counter[int] = Counter()
        for value, rows in values.items():
            bins[value.bit_length() if by_power else value] += rows
        names = {b: _bin_name(b) if by_power else str(b) for b in sorted(bins)}
        total = max(1, sum(values.values()))
        mean = round(sum(value * rows for value, rows in values.items()) / total, 2)
        return cls(unit=unit, rows={names[b]: bins[b] for b in names}, mean=mean, largest=max(values, default=0))


@dataclass(kw_only=True)
class Report:
    """report.json: rows = kept + sum of dropped, kept = train + val."""

    rows: int = 0
    kept: int = 0
    images: int = 0
    """Images of the kept rows, with repetitions."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason; one reason a row. dropped.jsonl names each."""
    train: int = 0
    val: int = 0
    train_characters: int = 0
    """Characters of all turns of the training rows, sentinels left out; with train_images and the tokens an image
    takes, an estimate of the tokens of a pass (about 4 characters a token in English)."""
    train_images: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    """Kept rows that were changed: repaired_placeholders, skipped_first_turn."""
    archives: dict[str, dict[str, int]] = field(default_factory=dict)
    """Entries refused in archives that were unpacked, by archive and reason."""
    unreadable_images: dict[str, int] = field(default_factory=dict)
    """Images of kept rows that could not be put into a tar shard, by reason; streaming skips their rows."""
    form: str = "jsonl"
    length: Histogram = field(default_factory=lambda: Histogram(unit="characters"))
    images_per_row: Histogram = field(default_factory=lambda: Histogram(unit="images"))


def draw(report: Report, path: Path) -> None:
    """Draw the histograms as PNG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, histogram in zip(figure.subplots(1, 2), (report.length, report.images_per_row), strict=True):
        axis.bar(list(histogram.rows), list(histogram.rows.values()), color="#4a7ab5")
        axis.set(xlabel=f"{histogram.unit} a row", ylabel="rows", title=f"mean {histogram.mean:g}")
        axis.tick_params(axis="x", labelrotation=45, labelsize=7)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _bin_name(bits: int) -> str:
    low, high = (1 << bits) >> 1, (1 << bits) - 1
    return str(low) if low >= high else f"{low}-{high}"
