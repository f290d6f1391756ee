"""Exchanges in which no other rank takes part."""

from collections.abc import Callable

from torch import Tensor

from engine.bands.exchange import Exchange, Halo


class Alone(Exchange):
    """What a layer would be told if its band were the whole picture."""

    def __init__(self) -> None:
        """There is no mesh, and no traffic to count."""

    @property
    def is_top(self) -> bool:
        return True

    @property
    def is_bottom(self) -> bool:
        return True

    def halo_later(
        self, layer: object, x: Tensor, above: int, below: int, shared: bool = False
    ) -> Callable[[], Halo]:
        return lambda: (None, None)

    def sum_later(self, layer: object, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        return x


class Fetched(Alone):
    """For one 3x3 convolution, and a LoRA around it, whose neighbours' rows are here already.

    Args:
        rows: [B, C, h + 2, W], what the convolution is going to be called with between the rows
            of its neighbours, or zeros where the picture ends.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def between(self, layer: object, x: Tensor, halo: tuple[int, int], edge: int) -> Tensor:
        assert halo == (1, 1)
        assert x.shape[2] + 2 == self.rows.shape[2]
        return self.rows.to(x.dtype)  # a LoRA may have weights of another
