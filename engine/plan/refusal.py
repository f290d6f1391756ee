"""What does not fit is refused, with the settings that do, simulated before they are named.

Remedies are tried from the mildest to the dearest, one more at a time, until the job fits; then
those that it does not take are left out again. More ranks come last, since not everybody has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.config import Settings, UserError
from engine.plan.needs import DryRun, Needs
from engine.plan.table import gigabytes, ranks_text


@dataclass(frozen=True)
class Remedy:
    """A setting that saves memory.

    Attributes:
        needs: what there must be for it, "a GPU" or "ranks".
    """

    group: str
    name: str
    value: Any
    needs: str = ""

    def __str__(self) -> str:
        name = self.name.replace("_", "-")
        return f"--{self.group}.{name} {str(self.value).lower()}"

    def applied(self, settings: Settings) -> Settings:
        """`settings` with it."""
        group = getattr(settings, self.group)
        changed = group.model_copy(update={self.name: self.value})
        return settings.model_copy(update={self.group: changed})

    def is_possible(self, settings: Settings, ranks: int, on_gpu: bool) -> bool:
        """Whether it can be chosen, and is not yet."""
        if (self.needs == "a GPU" and not on_gpu) or (self.needs == "ranks" and ranks == 1):
            return False
        if self.group == "codec" and (settings.codec.mode == "exact") != (self.name == "mode"):
            return False  # 'auto' streams already
        return bool(getattr(getattr(settings, self.group), self.name) != self.value)


REMEDIES = (
    Remedy("codec", "mode", "streaming"),
    Remedy("codec", "chunk_rows", 1),
    Remedy("memory", "guidance_in_turn", True),
    Remedy("memory", "token_chunks", 16),
    Remedy("memory", "row_chunks", 16),
    Remedy("memory", "skips_on_host", True, needs="a GPU"),
    Remedy("memory", "sharded_weights", True, needs="ranks"),
)


def refusal(dry_run: DryRun, settings: Settings, needs: Needs) -> str | None:
    """Why the job does not fit, and with what it does; None if it fits."""
    limit_bytes = dry_run.limit_bytes
    if needs.peak_bytes <= limit_bytes:
        return None
    if needs.weight_bytes > limit_bytes and needs.ranks == 1:
        return (
            f"the weights alone take {gigabytes(needs.weight_bytes)} on every rank, and "
            f"{gigabytes(limit_bytes)} are free: take a dtype of fewer bytes, or a smaller model"
        )
    rung, part = needs.highest.rung, needs.highest.largest
    wanting = (
        f"the {part.name} of the rung of {rung} px needs {gigabytes(part.peak_bytes)} on a rank, "
        f"besides {gigabytes(needs.weight_bytes)} of weights, and {gigabytes(limit_bytes)} are free"
    )
    # What fits on the rung that needs most fits on all: their parts grow alike with the picture,
    # and where the codec is 'auto', what does not fit exactly is streamed.
    search = _Search(dry_run.shallow(), settings, needs.ranks, {rung.index})
    return f"{wanting}: {search.advice()}"


@dataclass
class _Search:
    dry_run: DryRun
    settings: Settings
    ranks: int
    only: set[int]

    def advice(self) -> str:
        """What to do, as the end of a sentence."""
        remedies: list[Remedy] = []
        needs = self._needs(remedies, self.ranks)
        untried = list(REMEDIES)
        while remedy := self._next(untried, remedies, needs):
            untried.remove(remedy)
            tried = self._needs([*remedies, remedy], self.ranks)
            if tried is None:
                continue
            # Kept even if it saves nothing alone: the next one may uncover what it saves.
            remedies, needs = [*remedies, remedy], tried
            if needs.peak_bytes <= self.dry_run.limit_bytes:
                return self._sentence(remedies, self.ranks, needs.peak_bytes)
        for ranks in self._more_ranks():
            if peak := self._fitting_peak(remedies, ranks):
                return self._sentence(remedies, ranks, peak)
        return "no setting that this version knows makes it fit; a smaller picture would"

    def _next(
        self, untried: list[Remedy], remedies: list[Remedy], needs: Needs | None
    ) -> Remedy | None:
        """The mildest remedy for the part that needs most."""
        settings = self._with(remedies)
        is_pixels = needs is not None and needs.highest.largest.name in ("encoder", "decoder")
        for remedy in untried:
            if (remedy.group == "codec") == is_pixels and remedy.is_possible(
                settings, self.ranks, self.dry_run.on_gpu
            ):
                return remedy
        return None

    def _with(self, remedies: list[Remedy]) -> Settings:
        settings = self.settings
        for remedy in remedies:
            settings = remedy.applied(settings)
        return settings

    def _more_ranks(self) -> Iterator[int]:
        """Twice as many, and again, as long as there are rows for them."""
        ranks = 2 * self.ranks
        while self._needs([], ranks) is not None:
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
        needs = self._needs(remedies, ranks)
        fits = needs is not None and needs.peak_bytes <= self.dry_run.limit_bytes
        return needs.peak_bytes if needs is not None and fits else None

    def _needs(self, remedies: list[Remedy], ranks: int) -> Needs | None:
        """What a rank would need; None where the picture has too few rows for so many."""
        try:
            return self.dry_run.needs(self._with(remedies), ranks, self.only)
        except UserError:
            return None
