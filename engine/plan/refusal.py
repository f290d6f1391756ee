"""What does not fit is refused, with the settings that do, simulated before they are named.

Remedies are tried from the mildest to the dearest, one more at a time, until the job fits; then
those that it does not take are left out again. More ranks come last, since not everybody has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.config import Settings, UserError
from engine.plan.needs import Needs, Rehearsal
from engine.plan.table import gigabytes, ranks_text


@dataclass(frozen=True)
class Remedy:
    """A setting that saves memory."""

    group: str
    name: str
    value: Any

    def __str__(self) -> str:
        name = self.name.replace("_", "-")
        return f"--{self.group}.{name} {str(self.value).lower()}"

    def applied(self, settings: Settings) -> Settings:
        """`settings` with it."""
        group = getattr(settings, self.group)
        changed = group.model_copy(update={self.name: self.value})
        return settings.model_copy(update={self.group: changed})

    def helps(self, settings: Settings) -> bool:
        """Whether it is not set already."""
        return bool(getattr(getattr(settings, self.group), self.name) != self.value)


REMEDIES = (Remedy("memory", "guidance_in_turn", True),)


def refusal(rehearsal: Rehearsal, settings: Settings, needs: Needs, limit_bytes: int) -> str | None:
    """Why the job does not fit into `limit_bytes` a rank, and what does; None if it fits."""
    if needs.peak_bytes <= limit_bytes:
        return None
    if needs.weight_bytes > limit_bytes:
        return (
            f"the weights alone take {gigabytes(needs.weight_bytes)} on every rank, and "
            f"{gigabytes(limit_bytes)} are free: take a dtype of fewer bytes, or a smaller model"
        )
    rung, part = needs.highest.rung, needs.highest.largest
    wanting = (
        f"the {part.name} of the rung of {rung} px needs {gigabytes(part.peak_bytes)} on a rank, "
        f"besides {gigabytes(needs.weight_bytes)} of weights, and {gigabytes(limit_bytes)} are free"
    )
    # The rungs that fit go on to fit: no remedy takes more.
    only = {
        rung.rung.index
        for rung in needs.rungs
        if needs.weight_bytes + rung.largest.peak_bytes > limit_bytes
    }
    search = _Search(rehearsal, settings, needs.ranks, limit_bytes, only)
    return f"{wanting}: {search.advice()}"


@dataclass
class _Search:
    rehearsal: Rehearsal
    settings: Settings
    ranks: int
    limit_bytes: int
    only: set[int]

    def advice(self) -> str:
        """What to do, as the end of a sentence."""
        remedies: list[Remedy] = []
        for remedy in REMEDIES:
            if remedy.helps(self.settings):
                remedies.append(remedy)
                if peak := self._fitting_peak(remedies, self.ranks):
                    return self._sentence(remedies, self.ranks, peak)
        for ranks in self._more_ranks():
            if peak := self._fitting_peak(remedies, ranks):
                return self._sentence(remedies, ranks, peak)
        return "no setting that this version knows makes it fit; a smaller picture would"

    def _more_ranks(self) -> Iterator[int]:
        """Twice as many, and again, as long as there are rows for them."""
        ranks = 2 * self.ranks
        while self._peak([], ranks) is not None:
            yield ranks
            ranks *= 2

    def _sentence(self, remedies: list[Remedy], ranks: int, peak: int) -> str:
        for remedy in list(remedies):
            fewer = [other for other in remedies if other is not remedy]
            if (fewer or ranks > self.ranks) and (found := self._fitting_peak(fewer, ranks)):
                remedies, peak = fewer, found
        ways = [] if ranks == self.ranks else [f"{ranks_text(ranks)} of as much memory each"]
        if remedies:
            ways.append(" ".join(map(str, remedies)))
        return f"{' with '.join(ways)} would do with {gigabytes(peak)} in all"

    def _fitting_peak(self, remedies: list[Remedy], ranks: int) -> int | None:
        peak = self._peak(remedies, ranks)
        return peak if peak is not None and peak <= self.limit_bytes else None

    def _peak(self, remedies: list[Remedy], ranks: int) -> int | None:
        """What a rank would need; None where the picture has too few rows for so many."""
        settings = self.settings
        for remedy in remedies:
            settings = remedy.applied(settings)
        try:
            return self.rehearsal.needs(settings, ranks, self.only).peak_bytes
        except UserError:
            return None
