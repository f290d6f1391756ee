"""What lies between a UNet's large products, in one pass over memory each, by Triton, on GPUs.

    norm_silu    SiLU(group norm(x)), whose mean and variance are known, on its way to a convolution
    geglu        hidden * gelu(gate), on its way out of a feed-forward

By torch each of them is two passes, all of which write and read the whole tensor: the norm, then
SiLU, and a copy more where the result belongs between halo rows; gelu, then the product. Here
nothing is rounded on the way, so in half precision the result is closer to that of fp32 than
torch's is.

The plain formulas stand beside the kernels. Where these cannot compute (with gradients, in fp64, on
a CPU, in another layout of memory), torch does, as it does without them.

What was run: the kernels in Triton's interpreter only, on CPU tensors, against the formulas. Triton
3.7 compiled them for sm_80 and sm_90, with reads of 16 bytes. What was not run: a GPU with them.
Neither speed nor the compiled code's results are known and no gain has been measured, so nothing
uses them unless it is asked to (`kernels: fused`).
"""

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional as F

from engine.kernels.fused import DTYPES, is_available

# Numbers of one program, by arithmetic: 8 a thread are 16 bytes in half precision.
_MOST_OF_A_CHANNEL = 1024
_TOKENS, _COLUMNS = 4, 256  # 256 divides the widths of Stable Diffusion, 1280, 2560 and 5120


class FusedSiLU(nn.SiLU):
    """SiLU, by `norm_silu` where a group norm with known statistics is before it.

    Called by itself it is the plain layer; who calls norm and SiLU together looks for this class.
    """


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """A gated linear unit by `geglu`; its projection, with a LoRA or not, is called as ever."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[..., C] -> [..., inner]"""
        return geglu(self.proj(hidden_states))


def _computes(x: Tensor) -> bool:
    """Whether there is a kernel for tensors like `x`, in inference."""
    return not torch.is_grad_enabled() and x.dtype in DTYPES and is_available(x.device)


# --- group norm and SiLU --------------------------------------------------------------------------


def can_norm_silu(norm: nn.GroupNorm, *tensors: Tensor) -> bool:
    """Whether `norm_silu` takes these [B, C, h, W]: channels first, each of them in one piece."""
    whole = (norm.weight is None) == (norm.bias is None)
    return whole and all(_computes(x) and _has_planes(x) for x in tensors)


def _has_planes(x: Tensor) -> bool:
    height, width = x.shape[2:]
    rows = height == 1 or x.stride(2) == width
    return rows and (width == 1 or x.stride(3) == 1)


def plain_norm_silu(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """SiLU((x - mean) / sqrt(variance + eps) * weight + bias), as it is meant.

    Args:
        x: [B, C, h, W]
        mean, variance: [B, groups], in which precision it is computed.

    Returns:
        [B, C, h, W] in the dtype of x.
    """
    grouped = x.to(mean.dtype).unflatten(1, (norm.num_groups, -1))
    mean, variance = mean[:, :, None, None, None], variance[:, :, None, None, None]
    y = ((grouped - mean) * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
    if norm.weight is not None:
        y = y * norm.weight.to(y.dtype)[:, None, None]
    if norm.bias is not None:
        y = y + norm.bias.to(y.dtype)[:, None, None]
    return F.silu(y).to(x.dtype)


def norm_silu(
    norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor, out: Tensor | None = None
) -> Tensor:
    """`plain_norm_silu` in one pass, for tensors that `can_norm_silu`.

    Args:
        x: [B, C, h, W]
        mean, variance: [B, groups], fp32.
        out: [B, C, h, W] to write into, some rows of a larger tensor, say, the others of which
            stay as they are.
    """
    from engine.kernels import pointwise_triton

    out = x.new_empty(x.shape) if out is None else out
    assert out.shape == x.shape
    assert mean.dtype == variance.dtype == torch.float32
    batch, channels, height, width = x.shape
    size = height * width
    block = min(_MOST_OF_A_CHANNEL, max(128, 1 << (size - 1).bit_length()))
    blocks = -(-size // block)
    with torch.cuda.device_of(x):
        pointwise_triton.norm_silu[(batch * channels * blocks,)](
            x, mean.contiguous(), variance.contiguous(), norm.weight, norm.bias, out,
            size, channels, channels // norm.num_groups, blocks, norm.eps,
            *x.stride()[:2], *out.stride()[:2], AFFINE=norm.weight is not None, BLOCK=block,
        )  # fmt: skip
    return out


# --- gated linear units ---------------------------------------------------------------------------


def plain_geglu(projected: Tensor, in_place: bool = False) -> Tensor:
    """hidden * gelu(gate), as it is meant: [..., 2 * inner] -> [..., inner]; see `geglu`."""
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden.mul_(F.gelu(gate)) if in_place else hidden * F.gelu(gate)


def can_geglu(projected: Tensor) -> bool:
    """Whether there is a kernel for `projected`, [..., 2 * inner] in one piece."""
    return _computes(projected) and projected.is_contiguous()


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
