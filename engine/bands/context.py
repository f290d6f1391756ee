"""The ambient bands: a layer asks whether it runs on a band, and with whom to exchange.

The boundary of a network (`engine.distribute`, `engine.codec`) enters `banded(exchange)`; every
layer inside finds it by `current_exchange()`. No layer has a field for it, so that a network can be
saved, copied, given a LoRA, and run whole, all without taking anything off again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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


def sum_over_bands(layer: object, state: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum a `state` and a `count` (of tokens, say) over all bands, in one all-reduce.

    Uneven bands stay right, since what is added up is not yet divided by anything. In fp32 the
    count is exact to 2^24, the tokens of a 32768 x 32768 picture.

    Returns:
        (state of the same shape, count as a scalar), unchanged outside of bands.
    """
    assert state.dtype in (torch.float32, torch.float64), "half precision cannot count tokens"
    total = state.new_full((1,), count)
    exchange = current_exchange()
    if exchange is None:
        return state, total[0]
    packed = exchange.sum(layer, torch.cat([state.flatten(), total]))
    return packed[:-1].view_as(state), packed[-1]
