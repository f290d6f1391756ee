"""The ambient bands: a layer asks whether it runs on a band, and with whom to exchange.

The boundary of a network (`engine.distribute`, `engine.codec`) enters `banded(exchange)`; every
layer inside finds it by `current_exchange()`. No layer has a field for it, so that a network can be
saved, copied, given a LoRA, and run whole, all without taking anything off again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from engine.bands.exchange import Exchange

_exchange: ContextVar[Exchange | None] = ContextVar("engine.bands", default=None)


@contextmanager
def banded(exchange: Exchange | None) -> Iterator[None]:
    """Inside, tensors [B, C, h, W] are this rank's rows, and layers exchange by `exchange`."""
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


def current_exchange() -> Exchange | None:
    """The exchange that the running network is banded by, or None where it sees whole pictures."""
    return _exchange.get()


def mean_over_bands(layer: object, sums: Tensor, count: int) -> Callable[[], Tensor]:
    """`sums` over `count` things (tokens, say), both added up over all bands in one all-reduce.

    Uneven bands stay right, since what is added up is not yet divided by anything. In fp32 the
    count is exact to 2^24, the tokens of a 32768 x 32768 picture.

    Returns:
        A function that waits for the mean, of the same shape, which is made once. The all-reduce
        is on its way meanwhile.
    """
    assert sums.dtype in (torch.float32, torch.float64), "half precision cannot count tokens"
    exchange = current_exchange()
    if exchange is None:
        return cache(lambda: sums / count)
    packed = exchange.sum_later(layer, torch.cat([sums.flatten(), sums.new_full((1,), count)]))

    @cache
    def mean() -> Tensor:
        total = packed()
        return total[:-1].view_as(sums) / total[-1]

    return mean
