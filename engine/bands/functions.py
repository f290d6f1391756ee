"""Functions, not layers, that look beyond their own rows: FreeU's filter, masks, global means.

diffusers calls these by name from the middle of its blocks, where there is no class to swap. Two
are replaced in diffusers once (`install`) by functions that are the old ones outside of bands; the
third, `torch.mean` over the picture, is caught while a ControlNet runs.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.utils import torch_utils
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.bands.context import banded, current_exchange, mean_over_bands

# Labels for the traffic, where no layer asks.
_FREEU = SimpleNamespace(traffic_kind="FreeU")
_MASK = SimpleNamespace(traffic_kind="IP-Adapter mask")

_whole_fourier_filter = torch_utils.fourier_filter
_whole_downsample = IPAdapterMaskProcessor.downsample


def install() -> None:
    """Let diffusers call this module's functions. Calling it again changes nothing."""
    torch_utils.fourier_filter = fourier_filter
    IPAdapterMaskProcessor.downsample = staticmethod(downsample_mask)


def fourier_filter(x_in: Tensor, threshold: int, scale: float) -> Tensor:
    """Scale the lowest frequencies of x [B, C, h, W] by `scale` (FreeU, arXiv:2309.11497, eq. 5).

    The mask that diffusers centres on the shifted spectrum covers the frequencies -threshold ...
    threshold - 1 in both directions, four of them for its threshold of 1. Their coefficients are
    sums over all pixels, so bands add up 4 complex numbers a channel instead of transforming the
    picture:  y = x + (scale - 1) / (H W)  sum_f  Re(c_f e_f),   c_f = sum over pixels of x e_f*.
    """
    exchange = current_exchange()
    if exchange is None:
        return _whole_fourier_filter(x_in, threshold, scale)
    # diffusers filters in fp32 whatever comes in; parity is with that.
    x = x_in.to(torch.float32)
    rows = exchange.lengths(_FREEU, x.shape[-2])
    top = sum(rows[: exchange.mesh.rank])
    basis_y = _waves(threshold, torch.arange(top, top + x.shape[-2], device=x.device), sum(rows))
    basis_x = _waves(threshold, torch.arange(x.shape[-1], device=x.device), x.shape[-1])
    own = torch.einsum("bchw,fh,gw->bcfg", x.to(basis_y.dtype), basis_y.conj(), basis_x.conj())
    summed = exchange.sum(_FREEU, torch.view_as_real(own))
    coefficients = torch.view_as_complex(summed) / (sum(rows) * x.shape[-1])
    low = torch.einsum("bcfg,fh,gw->bchw", coefficients, basis_y, basis_x).real
    return (x + (scale - 1) * low).to(x_in.dtype)


def _waves(threshold: int, places: Tensor, period: int) -> Tensor:
    """exp(2 pi i f n / period) for the masked frequencies f and places n: [frequencies, places].

    In double precision: the phases of far rows would lose their digits in fp32. A period shorter
    than the mask has only `period` frequencies.
    """
    centre = period // 2
    low, high = max(0, centre - threshold), min(period, centre + threshold)
    frequencies = torch.arange(low - centre, high - centre, device=places.device)
    phases = torch.outer(frequencies, places).double() * (2 * torch.pi / period)
    return torch.polar(torch.ones_like(phases), phases)


def downsample_mask(
    mask: Tensor, batch_size: int, num_queries: int, value_embed_dim: int
) -> Tensor:
    """IP-Adapter masks [n, H, W] -> [n or B, tokens, d], the tokens being this band's.

    diffusers infers a mask's size from the number of queries, so the mask is made for the tokens
    of all bands, then cut.
    """
    exchange = current_exchange()
    if exchange is None:
        return _whole_downsample(mask, batch_size, num_queries, value_embed_dim)
    tokens = exchange.lengths(_MASK, num_queries)
    with banded(None):  # a mask is whole on every rank
        whole = _whole_downsample(mask, batch_size, sum(tokens), value_embed_dim)
    start = sum(tokens[: exchange.mesh.rank])
    return whole[:, start : start + num_queries]


class GlobalMean(TorchFunctionMode):
    """While active, `torch.mean(x, dim=(2, 3))` of a band is the mean over all bands.

    ControlNet's `global_pool_conditions` and ControlNetUnion's condition features take it.
    """

    def __init__(self, layer: object) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.mean, Tensor.mean) and _dims(args, kwargs) == (2, 3):
            return self._mean(args[0], bool(kwargs.get("keepdim", False)))
        return func(*args, **kwargs)

    def _mean(self, x: Tensor, keepdim: bool) -> Tensor:
        total = x.to(torch.promote_types(x.dtype, torch.float32)).sum((2, 3), keepdim=keepdim)
        return mean_over_bands(self.layer, total, x.shape[2] * x.shape[3])().to(x.dtype)


def _dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return tuple(dims) if isinstance(dims, list | tuple) else None
