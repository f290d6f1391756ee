"""What lies between a UNet's large products, in one pass over memory each, by Triton, on GPUs.

    geglu    hidden * gelu(gate), on its way out of a feed-forward
    add      x + y + bias, where a residual block ends
    put      y + bias, between the pixels of a picture that is doubled

By torch each of them is two passes, all of which write and read the whole tensor. Here nothing is
rounded on the way, so in half precision the result is closer to that of fp32 than torch's is.

The plain formulas stand beside the kernels. Where these cannot compute (with gradients, in fp64, on
a CPU, in another layout of memory), torch does, as it does without them.
"""

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.fused import has_kernels

# Numbers of one program, by arithmetic: 8 a thread are 16 bytes in half precision.
_BLOCK = 1024
_TOKENS, _COLUMNS = 4, 256  # 256 divides the widths of Stable Diffusion, 1280, 2560 and 5120


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """A gated linear unit by `geglu`; its projection, with a LoRA or not, is called as ever."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[..., C] -> [..., inner]"""
        return geglu(self.proj(hidden_states))


# --- gated linear units ---------------------------------------------------------------------------


def plain_geglu(projected: Tensor, in_place: bool = False) -> Tensor:
    """hidden * gelu(gate), as it is meant: [..., 2 * inner] -> [..., inner]; see `geglu`."""
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden.mul_(F.gelu(gate)) if in_place else hidden * F.gelu(gate)


def can_geglu(projected: Tensor) -> bool:
    """Whether there is a kernel for `projected`, [..., 2 * inner] in one piece."""
    return has_kernels(projected) and projected.is_contiguous()


def geglu(projected: Tensor, in_place: bool = False) -> Tensor:
    """`plain_geglu` in one pass where it `can_geglu`: [..., 2 * inner] -> [..., inner].

    Args:
        in_place: the result is the first half of `projected`, written over.
    """
    if not can_geglu(projected):
        return plain_geglu(projected, in_place)
    from engine.kernels import pointwise_triton

    inner = projected.shape[-1] // 2
    rows, blocks = projected.numel() // (2 * inner), -(-inner // _COLUMNS)
    hidden = projected[..., :inner]
    out = hidden if in_place else torch.empty_like(hidden, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(projected):
        pointwise_triton.geglu[(-(-rows // _TOKENS) * blocks,)](
            projected, out, rows, inner, blocks, 2 * inner, 2 * inner if in_place else inner,
            ROWS=_TOKENS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return out


# --- sums -----------------------------------------------------------------------------------------


def plain_add(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + y + bias, as it is meant: [B, C, h, W] twice and [C] -> [B, C, h, W]"""
    return x + y if bias is None else x + y + bias[:, None, None]


def can_add(x: Tensor, y: Tensor) -> bool:
    """Whether there is a kernel for these [B, C, h, W], both channels last in one piece."""
    alike = x.shape == y.shape and x.dtype == y.dtype
    lasting = all(z.is_contiguous(memory_format=torch.channels_last) for z in (x, y))
    return alike and lasting and has_kernels(x) and x.numel() > 0


def add(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """`plain_add` in one pass, in the memory of x, where it `can_add`."""
    if not can_add(x, y):
        return plain_add(x, y, bias)
    from engine.kernels import pointwise_triton

    with torch.cuda.device_of(x):
        pointwise_triton.add[(-(-x.numel() // _BLOCK),)](
            x, y, bias, x.numel(), x.shape[1], BIASED=bias is not None, BLOCK=_BLOCK
        )
    return x


# --- phases ---------------------------------------------------------------------------------------


def plain_put(out: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """out = y + bias, as it is meant: [B, C, h, W] twice and [C]"""
    out.copy_(y if bias is None else y + bias[:, None, None])


def can_put(out: Tensor, y: Tensor) -> bool:
    """Whether there is a kernel for these [B, C, h, W], whose channels lie side by side."""
    by_pixels = out.stride(1) == y.stride(1) == 1
    return by_pixels and out.dtype == y.dtype and has_kernels(y) and y.numel() > 0


def put(out: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """`plain_put` in one pass where it `can_put`, of any strides from pixel to pixel."""
    if not can_put(out, y):
        plain_put(out, y, bias)
        return
    from engine.kernels import pointwise_triton

    batch, channels, height, width = y.shape
    blocks = -(-width * channels // _BLOCK)
    with torch.cuda.device_of(y):
        pointwise_triton.put[(batch * height * blocks,)](
            out, y, bias, height, width * channels, channels, blocks,
            *(view.stride(i) for view in (out, y) for i in (0, 2, 3)),
            BIASED=bias is not None, BLOCK=_BLOCK,
        )  # fmt: skip
