"""How many ranks share out what: the axes image x guidance x band of the mesh.

    image      independent pictures of one batch; nothing travels between them
    guidance   the unconditional and the conditional side; nothing travels between them either
    band       rows of one picture; halos, sums and states travel at every layer

The first two share out the batch, in which diffusers lays [unconditional pictures | conditional
pictures] one behind the other; ranks that have the same share cut its pictures into bands.
"""

import math
from dataclasses import dataclass

from engine.config import UserError


@dataclass(frozen=True)
class Axes:
    """Sizes of the axes; their product is the number of ranks.

    Attributes:
        reason: why these sizes, as a sentence for people.
    """

    image: int
    guidance: int
    band: int
    reason: str

    @property
    def groups(self) -> int:
        """Groups of ranks that share out the batch."""
        return self.image * self.guidance

    def __str__(self) -> str:
        return f"{self.image} image x {self.guidance} guidance x {self.band} band: {self.reason}"


def choose_axes(
    ranks: int,
    *,
    pictures: int = 1,
    guided: bool = True,
    image: int | None = None,
    guidance: int | None = None,
) -> Axes:
    """Factorise the ranks; None leaves an axis to be chosen.

    Chosen by what needs no communication: first as many groups as divide the pictures evenly, then
    the two sides of guidance, and only what is left cuts pictures into bands. A part of a batch
    computes as many rows either way, so memory does not speak against it.

    Args:
        pictures: in a batch, per side of guidance.
        guided: whether there are two sides (a guidance scale above 1).

    Raises:
        UserError: the sizes asked for do not divide the ranks, or share out more than there is.
    """
    if image is not None and pictures % image:
        raise UserError(f"an image axis of {image} cannot share out {pictures} pictures evenly")
    if guidance == 2 and not guided:
        raise UserError(
            "a guidance axis of 2 needs a guidance scale above 1: without it there is one side only"
        )
    taken = 1 if guidance is None else guidance
    chosen_image = math.gcd(pictures, ranks // taken) if image is None else image
    left = ranks // chosen_image
    chosen_guidance = (2 if guided and left % 2 == 0 else 1) if guidance is None else guidance
    groups = chosen_image * chosen_guidance
    if ranks % groups:
        raise UserError(
            f"{ranks} ranks do not fall into {chosen_image} (image) x {chosen_guidance} (guidance) "
            f"equal groups: start a multiple of {groups} ranks, or choose a smaller axis"
        )
    return Axes(
        chosen_image,
        chosen_guidance,
        ranks // groups,
        _reason(chosen_image, chosen_guidance, guided, left, guidance is None and image is None),
    )


def _reason(image: int, guidance: int, guided: bool, left: int, automatic: bool) -> str:
    if not automatic:
        return "as asked"
    parts = []
    if image > 1:
        parts.append("pictures need nothing of each other")
    if guidance > 1:
        parts.append("the two sides of guidance need nothing of each other")
    elif guided and left > 1:
        parts.append(f"{left} ranks do not fall into two equal sides of guidance")
    elif left > 1:
        parts.append("there is no guidance to share out")
    return ", and ".join(parts) or "one rank does it all"


def fitting_groups(ranks: int, groups: int, most_bands: int) -> int:
    """The fewest groups, `groups` or more, that leave no more bands than a small picture has.

    More groups than the batch has samples all compute the same: a rank that waits is no faster.
    """
    return next(
        parts
        for parts in range(groups, ranks + 1)
        if ranks % parts == 0 and ranks // parts <= most_bands
    )
