"""The curve of the losses: `losses.csv`, a line a step, and `losses.png`.

A resumed run writes on where its checkpoint is: lines of steps that are done again are cut off. The
picture needs matplotlib (the extra `distill`); without it there is the table.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One step: the loss, its three parts (unweighted), the rate, and the gradient's norm."""

    step: int
    loss: float
    noise: float
    output: float
    features: float
    rate: float
    gradient: float


class Curve:
    """The table in `folder`, from `step` on."""

    def __init__(self, folder: Path, step: int) -> None:
        self._file = folder / "losses.csv"
        self.records = [record for record in _read(self._file) if record.step < step]

    def begin(self) -> None:
        """Cut off what is done again."""
        temporary = self._file.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = _writer(file)
            writer.writeheader()
            writer.writerows(asdict(record) for record in self.records)
        temporary.replace(self._file)

    def add(self, record: Record) -> None:
        """A step is done."""
        self.records.append(record)
        with self._file.open("a", newline="") as file:
            _writer(file).writerow(asdict(record))

    def draw(self) -> None:
        """The picture of all steps so far."""
        if find_spec("matplotlib") is None or not self.records:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name in ("loss", "noise", "output", "features"):
            values = [getattr(record, name) for record in self.records]
            steps = [record.step for record in self.records]
            smooth = list(_smoothed(values))
            axes.plot(steps, smooth, label=f"{name} ({smooth[-1]:.4g})")
        axes.set(yscale="log", xlabel="step", ylabel="smoothed; the last in brackets")
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        temporary = self._file.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, self._file.with_suffix(".png"))


def _smoothed(values: list[float], weight: float = 0.95) -> Iterator[float]:
    """An average that is right from the first value on."""
    total, weights = 0.0, 0.0
    for value in values:
        total, weights = weight * total + value, weight * weights + 1
        yield total / weights


def _writer(file: Any) -> "csv.DictWriter[str]":
    return csv.DictWriter(file, [field.name for field in fields(Record)])


def _read(path: Path) -> Iterator[Record]:
    """The whole lines; a kill may have cut the last one."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            try:
                step = int(line.pop("step"))
                yield Record(step, **{name: float(value) for name, value in line.items()})
            except (KeyError, TypeError, ValueError):
                return
