"""A sentinel for bands: under it, any operation that mixes rows outside of `engine.bands` raises.

    with Sentinel():
        pipe("a lake")      # on every rank, distributed

Inside of `banded(...)` a tensor is some rows of the picture, and whatever mixes rows has to ask the
other bands. Only `engine.bands` knows how, so an operation is told by the file that calls it: the
same convolution is silent when `BandConv2d` calls it and raises when a plain layer does.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from engine import bands
from engine.bands import current_exchange
from engine.kernels import convolution

# Nothing but `engine.bands` calls the latter.
_BANDS = (str(Path(bands.__file__).parent), str(Path(convolution.__file__)))
_TORCH = str(Path(torch.__file__).parent)


class Sentinel(TorchFunctionMode):
    """Active inside of bands only; `seen` counts what it looked at there."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if current_exchange() is not None:
            self.seen += 1
            if reason := _mixes_rows(func, args, kwargs):
                caller = _caller().f_code
                if not caller.co_filename.startswith(_BANDS):
                    raise AssertionError(
                        f"{reason} on a band, called from {caller.co_filename}, {caller.co_name}()"
                    )
        return func(*args, **kwargs)


def _caller():
    """The frame that called into torch."""
    frame = sys._getframe()
    while (
        frame.f_code.co_filename.startswith((_TORCH, __file__))
        or frame.f_code.co_name == "__torch_function__"  # another mode that passes the call on
    ):
        frame = frame.f_back
    return frame


def _mixes_rows(func, args, kwargs):
    """Why this operation looks beyond a row of its first argument, or None."""
    rule = _RULES.get(func)
    return rule and rule(func.__name__, *args, **kwargs)


def _always(name, *args, **kwargs):
    return name


def _kernel(name, x, weight, *args, **kwargs):
    return f"a {weight.shape[2]} rows high {name}" if weight.shape[2] > 1 else None


def _pad(name, x, pad, *args, **kwargs):
    return "padding of rows" if x.ndim == 4 and any(pad[2:4]) else None


def _resize(name, x, size=None, scale_factor=None, mode="nearest", *args, **kwargs):
    """Doubling rows needs no neighbours, nor does leaving the last row of the double off."""
    rows = 2 * x.shape[2] if size is None else size[0]
    doubles = scale_factor in (2, 2.0, None) and rows in (2 * x.shape[2], 2 * x.shape[2] - 1)
    return None if mode == "nearest" and doubles else f"{name} ({mode})"


def _attention(name, query, key, *args, **kwargs):
    attention = _caller().f_locals.get("attn")  # what diffusers' processors are called with
    if getattr(attention, "is_cross_attention", False):
        return None
    return f"{name} among own tokens" if query.shape[-2] == key.shape[-2] else None


def _softmax(name, x, dim=-1, *args, **kwargs):
    is_square = x.ndim > 2 and x.shape[-1] == x.shape[-2]
    return f"{name} among own tokens" if is_square or dim in (1, 2, -2) else None


def _reduce(name, x, dim=None, *args, **kwargs):
    """Over rows of [B, C, h, W] or tokens of [B, n, C], or over everything."""
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = {d % x.ndim for d in dims} if x.ndim else set()
    rows = {4: 2, 3: 1}.get(x.ndim)
    return f"{name} over rows" if rows in dims else None


def _shift(name, x, *args, **kwargs):
    dims = kwargs.get("dims", args[-1] if args else None)
    dims = [dims] if isinstance(dims, int) else dims or range(x.ndim)
    return f"{name} of rows" if {4: 2, 3: 1}.get(x.ndim) in {d % x.ndim for d in dims} else None


def _both(*names):
    """The functions of these names in torch and its methods of tensors."""
    spaces = (torch, torch.Tensor, F)
    return {getattr(space, name) for name in names for space in spaces if hasattr(space, name)}


_RULES = {
    function: rule
    for functions, rule in [
        (_both("conv1d", "conv2d", "conv3d", "conv_transpose2d"), _kernel),
        (_both("group_norm", "instance_norm", "batch_norm", "local_response_norm"), _always),
        (_both("avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"), _always),
        (_both("unfold", "fold", "grid_sample", "pixel_shuffle", "pixel_unshuffle"), _always),
        ({getattr(torch.fft, name) for name in torch.fft.__all__ if "freq" not in name}, _always),
        (_both("pad"), _pad),
        (_both("interpolate", "upsample"), _resize),
        (_both("scaled_dot_product_attention"), _attention),
        (_both("softmax"), _softmax),
        (_both("mean", "sum", "var", "std", "amax", "amin", "var_mean", "cumsum"), _reduce),
        (_both("roll", "flip"), _shift),
    ]
    for function in functions
}
