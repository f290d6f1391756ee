"""A plan in words and columns, for people."""

from collections.abc import Sequence
from itertools import groupby

from engine.hardware import Speeds
from engine.plan.needs import Needs, RungPlan

_PARTS = ("UNet", "dilated UNet", "encoder", "decoder")


def rung_table(needs: Needs, speeds: Speeds) -> str:
    """A line for each rung: its rows on every rank, the peak of each part, bytes, time."""
    names = [
        n for n in _PARTS if any(part.name == n for rung in needs.rungs for part in rung.parts)
    ]
    head = ["rung", "steps", "rows of the ranks", *names, "codec", "sent", "time"]
    lines = [_line(rung, names, speeds) for rung in needs.rungs]
    return columns([head, *lines])


def _line(plan: RungPlan, names: Sequence[str], speeds: Speeds) -> list[str]:
    peaks = {part.name: gigabytes(part.peak_bytes) for part in plan.parts}
    return [
        str(plan.rung),
        str(plan.rung.steps_run),
        rows_text(plan),
        *(peaks.get(name, "-") for name in names),
        plan.codec,
        gigabytes(plan.cost.bytes_sent),
        duration(speeds.seconds(plan.cost)),
    ]


def rows_text(plan: RungPlan) -> str:
    """Bands from top to bottom, equal neighbours together: `2 x (3 x 344, 336)`."""
    runs = [(len(list(run)), rows) for rows, run in groupby(plan.rows)]
    text = ", ".join(f"{count} x {rows}" if count > 1 else str(rows) for count, rows in runs)
    return f"{plan.groups} x ({text})" if plan.groups > 1 else text


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def gigabytes(size: float) -> str:
    """In GB of 10^9 bytes, or in MB where there are few."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """In the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {rest:02d} s"
    )


def ranks_text(count: int) -> str:
    """1 rank, 2 ranks."""
    return f"{count} rank{'s' if count > 1 else ''}"
