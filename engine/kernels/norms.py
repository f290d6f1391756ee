"""Norms in the fewest passes over memory, by Triton, on GPUs, for channels that lie side by side.

    channel_moments   mean and squares of every channel of a picture: one pass, which only reads
    group_norm        of known statistics, and SiLU of it: one pass
    layer_norm        of every token, and LeakyReLU of it: one pass

torch's own group norm of a 320-channel picture takes as long as thirty such passes on an H200: it
gives each of the 32 groups of a picture to one multiprocessor of 132, and what is channels last it
copies before and after. Its layer norm of 320 channels takes five.

Pictures are [B, C, h, W] with `torch.channels_last` strides, which are those of tokens [B, h W, C]:
convolutions are fastest on them, and transformers take them as they are. Rows of such a picture
will do (`x[:, :, 2:7]`), and so will some of its channels.

The plain formulas stand beside the kernels. Where these cannot compute (with gradients, in fp64, on
a CPU, in another layout of memory) torch does, as it does without them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.kernels.fused import has_kernels

_ROWS, _COLUMNS = 64, 64  # of a tile: 64 channels are 128 bytes in half precision
_MOST_CHANNELS = 4096  # of a token, which a layer norm holds in registers
_TILE = 2048  # numbers of it, by which it takes several narrow tokens at once


class FusedLayerNorm(nn.LayerNorm):
    """A layer norm by `layer_norm`, where it can be."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        return layer_norm(self, input) if can_layer_norm(self, input) else super().forward(input)


def can_compute(*pictures: Tensor) -> bool:
    """Whether there are kernels for these [B, C, h, W], in inference."""
    return all(has_kernels(x) and is_by_tokens(x) for x in pictures)


def is_by_tokens(x: Tensor) -> bool:
    """Whether [B, C, h, W] is [B, h W, C] in memory, with as much from token to token."""
    if x.ndim != 4:
        return False
    _, channels, height, width = x.shape
    by_rows = height == 1 or width == 1 or x.stride(2) == width * x.stride(3)
    return by_rows and (channels == 1 or x.stride(1) == 1)


def _token_stride(x: Tensor) -> int:
    """Elements from a token to the next; the stride of a side of one means nothing."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


# --- group norm -----------------------------------------------------------------------------------


def tokens_of_moments(tokens: int, blocks: int) -> int:
    """Tokens that one program sums up: a power of two, by nothing but the size of the picture.

    Of a large one so that there are some 4096 programs, thirty for each multiprocessor of an H200.
    """
    return min(2048, max(_ROWS, 1 << (tokens * blocks // 8192).bit_length()))


def plain_channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """`channel_moments` as it is meant."""
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0)
    return mean, variance


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel: [B, C, h, W] that it `can_compute` -> [B, C] twice, fp64.

    Parts are summed up in fp32 and joined in fp64, in an order that is always the same.
    """
    from engine.kernels import norms_triton

    batch, channels, height, width = x.shape
    size = height * width
    blocks = -(-channels // _COLUMNS)
    of_program = tokens_of_moments(size, blocks)
    splits = -(-size // of_program)
    partials = x.new_empty(batch, splits, 2, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        norms_triton.channel_moments[(batch * splits * blocks,)](
            x, partials, size, channels, splits, blocks, x.stride(0), _token_stride(x),
            TOKENS=of_program, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    means, squares = partials.double().unbind(2)
    if splits == 1:
        return means[:, 0], squares[:, 0] / size
    rest = size - (splits - 1) * of_program
    # All parts are as large but for the last: weights without a copy from the host.
    mean = (means[:, :-1].sum(1) * of_program + means[:, -1] * rest) / size
    away = (means - mean[:, None]) ** 2
    between = away[:, :-1].sum(1) * of_program + away[:, -1] * rest
    return mean, (squares.sum(1) + between) / size


def plain_group_norm(
    norm: nn.GroupNorm,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """`group_norm` as it is meant, in the precision of `mean`, then rounded to that of x."""
    y = x.to(mean.dtype)
    if shift is not None:
        y = y + shift.to(y.dtype)[:, :, None, None]
    grouped = y.unflatten(1, (norm.num_groups, -1))
    mean, variance = mean[:, :, None, None, None], variance[:, :, None, None, None]
    y = ((grouped - mean) * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
    if norm.weight is not None:
        y = y * norm.weight.to(y.dtype)[:, None, None] + norm.bias.to(y.dtype)[:, None, None]
    return (F.silu(y) if silu else y).to(x.dtype)


def group_norm(
    norm: nn.GroupNorm,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    silu: bool = False,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(x + shift - mean) / sqrt(variance + eps) * weight + bias, and SiLU of it, in one pass.

    Args:
        x: [B, C, h, W] that it `can_compute`.
        mean, variance: [B, groups] of x + shift, fp32.
        shift: [B or 1, C], what is still to be added to x: a bias, say.
        out: [B, C, h, W] to write into, some rows of a larger tensor, say, the others of which
            stay as they are. It may be x.
    """
    from engine.kernels import norms_triton

    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    assert out.shape == x.shape
    assert mean.dtype == variance.dtype == torch.float32
    batch, channels, height, width = x.shape
    rows, blocks = -(-height * width // _ROWS), -(-channels // _COLUMNS)
    if shift is not None:
        assert shift.shape[1] == channels
        assert shift.stride(1) == 1
    with torch.cuda.device_of(x):
        norms_triton.group_norm[(batch * rows * blocks,)](
            x, mean.contiguous(), variance.contiguous(), norm.weight, norm.bias, shift, out,
            height * width, channels, channels // norm.num_groups, norm.num_groups, rows, blocks,
            norm.eps, x.stride(0), _token_stride(x), out.stride(0), _token_stride(out),
            0 if shift is None or len(shift) == 1 else shift.stride(0),
            AFFINE=norm.weight is not None, SHIFTED=shift is not None, SILU=silu,
            ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return out


# --- layer norm -----------------------------------------------------------------------------------


def can_layer_norm(norm: nn.LayerNorm, x: Tensor) -> bool:
    """Whether `layer_norm` takes these tokens [..., C] in one piece."""
    whole = (norm.weight is None) == (norm.bias is None)
    small = norm.normalized_shape == x.shape[-1:] and x.shape[-1] <= _MOST_CHANNELS
    return whole and small and has_kernels(x) and x.is_contiguous() and x.numel() > 0


def layer_norm(
    norm: nn.LayerNorm, x: Tensor, slope: float | None = None, out: Tensor | None = None
) -> Tensor:
    """`norm` of tokens [..., C] that it `can_layer_norm`, and LeakyReLU of that, in one pass.

    Args:
        slope: of the LeakyReLU where numbers are negative; None for none.
        out: to write into, in one piece as x, or x itself.
    """
    from engine.kernels import norms_triton

    out = torch.empty_like(x) if out is None else out
    channels = x.shape[-1]
    columns = max(16, 1 << (channels - 1).bit_length())
    at_once = max(1, _TILE // columns)
    rows = x.numel() // channels
    with torch.cuda.device_of(x):
        norms_triton.layer_norm[(-(-rows // at_once),)](
            x, norm.weight, norm.bias, out, rows, channels, norm.eps, slope or 0.0,
            AFFINE=norm.weight is not None, LEAKY=slope is not None, ROWS=at_once, COLUMNS=columns,
        )  # fmt: skip
    return out
