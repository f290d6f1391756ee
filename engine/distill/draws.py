"""What a step sees: drawn by the numbers of the step and the picture, and by nothing else.

A batch may thus be cut over any number of ranks, and a run go on after a kill, with the very same
pictures, noise and times. Pictures are drawn with replacement, so there are no epochs to keep
track of. Of several shapes, one is drawn for the whole step, so that a batch is of one shape and
all ranks take equally long; each picture is as likely as any other, whatever its shape.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distill.buckets import Shape


def generator(*numbers: int) -> torch.Generator:
    """On the CPU, where every machine draws alike."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw_shape(
    seed: int, step: int, pictures: dict[Shape, int], count_of: Callable[[int, int], int]
) -> Shape:
    """The shape of a step's pictures.

    Args:
        pictures: how many there are of each shape.
        count_of: how many a step of a shape takes.
    """
    steps = torch.tensor([n / count_of(*shape) for shape, n in pictures.items()])
    drawn = torch.multinomial(steps.double(), 1, generator=generator(seed, step))
    return list(pictures)[int(drawn)]


@dataclass(frozen=True)
class Draw:
    """What one picture of a step is seen with.

    Attributes:
        pick, time, wording: shares, 0 to 1, of how many there are.
        left_out: whether the caption is.
    """

    pick: float
    time: float
    wording: float
    left_out: bool
    generator: torch.Generator

    def noise(self, shape: torch.Size) -> Tensor:
        """Standard normal; to be called once."""
        return torch.randn(shape, generator=self.generator)


def draw(seed: int, step: int, index: int, dropout: float) -> Draw:
    """What picture `index` of a step is seen with."""
    own = generator(seed, step, index)
    pick, time, wording, left_out = torch.rand(4, generator=own, dtype=torch.float64).tolist()
    return Draw(pick, time, wording, left_out < dropout, own)


@dataclass(frozen=True)
class Share:
    """Pictures that a rank computes at once: their numbers in the step, and a weight for each.

    Weights are 1, or 0 for a picture that another rank counts: what this one computes while the
    others have more to do, so that all make the same exchanges.
    """

    indices: list[int]
    weights: list[float]


def shares(count: int, rank: int, ranks: int, micro: int | None) -> list[Share]:
    """What `rank` computes of a step of `count` pictures, `micro` at a time at most.

    As many shares on every rank.
    """
    most = -(-count // ranks)
    parts = -(-most // (micro or most))
    own = list(range(rank, count, ranks))
    cut = [own[part::parts] for part in range(parts)]
    return [Share(some, [1.0] * len(some)) if some else Share([0], [0.0]) for some in cut]
