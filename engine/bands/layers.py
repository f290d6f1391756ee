"""The layers that look beyond their own rows, each a subclass with the plain layer's constructor.

`engine.distribute` swaps the class of a network's layers in place (`layer.__class__ = BandConv2d`):
names, weights, hooks and state-dict keys stay as they were, and a LoRA library that builds
`type(layer)(...)` builds banded layers too. Outside of `banded(...)` each is the plain layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bands.alone import Alone
from engine.bands.context import current_exchange
from engine.bands.exchange import Exchange, is_fused, mean_and_variance, moments
from engine.bands.rows import halo_rows
from engine.config import UserError
from engine.kernels import norms
from engine.kernels.convolution import convolve_by_rows, convolve_doubled
from engine.kernels.fused import has_kernels
from engine.kernels.layout import has_hooks, layout_of


def plain_convolution(conv: Any) -> nn.Conv2d:
    """The convolution itself where a LoRA is around it."""
    return getattr(conv, "base_layer", conv)


class BandConv2d(nn.Conv2d):
    """A convolution that takes the rows next to its band from the neighbours (one round).

    On bands or not, no kernel is given a tensor of 2^31 elements or more, in or out.
    """

    traffic_kind = "convolution"

    def halo_rows(self) -> tuple[int, int]:
        """Rows needed (above, below) a band; see `engine.bands.rows.halo_rows`."""
        assert not isinstance(self.padding, str), "padding is given in pixels throughout diffusers"
        return halo_rows(self.kernel_size[0], self.stride[0], self.padding[0], self.dilation[0])

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, C, h, W] -> [B, C', h / stride, W / stride]

        Overridden rather than `forward`, which accelerate's offload hooks replace on the instance.
        """
        exchange = current_exchange()
        padding = (int(self.padding[0]), int(self.padding[1]))
        if exchange is not None and self.halo_rows() != (0, 0):
            input = exchange.between(self, input, self.halo_rows(), padding[0])
            padding = (0, padding[1])
        elif self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        options = (self.stride, padding, self.dilation, self.groups)
        return convolve_by_rows(input, weight, bias, *options)


class BandDownsample2D(Downsample2D):  # type: ignore[misc]
    """The VAE encoder's down-sampling, which pads (0, 1, 0, 1) outside of its convolution.

    The zero row under the picture belongs to the last band only; the others get their neighbour's
    row there from the convolution itself, which has no padding of its own.
    """

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[B, C, h, W] -> [B, C', h / 2, W / 2]"""
        exchange = current_exchange()
        if exchange is None or not (self.use_conv and self.padding == 0):
            return super().forward(hidden_states, *args, **kwargs)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv(F.pad(hidden_states, (0, 1, 0, int(exchange.is_bottom))))


class BandUpsample2D(Upsample2D):  # type: ignore[misc]
    """Doubling and its convolution, by phases (`engine.kernels.convolution`), on bands or not.

    The neighbours' rows are asked for before they are doubled, which is half as many bytes. All
    ranks ask alike, also for a last band that ends on an odd row.
    """

    def forward(
        self,
        hidden_states: Tensor,
        output_size: tuple[int, int] | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """[B, C, h, W] -> [B, C', 2h, 2W], or a row or a column less, as `output_size` says."""
        height, width = output_size or (2 * side for side in hidden_states.shape[-2:])
        less = 2 * hidden_states.shape[2] - height, 2 * hidden_states.shape[3] - width
        if not can_double(self) or not set(less) <= {0, 1}:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        size = None if output_size is None else (height, width)
        return self._double(current_exchange() or Alone(), hidden_states, size)

    def _double(self, exchange: Exchange, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        rows = exchange.between(self.conv, x, (1, 1), 1)
        return convolve_doubled(rows, self.conv.weight, self.conv.bias, size, is_fused(self))


def can_double(layer: Upsample2D) -> bool:
    """Whether `layer` doubles and convolves as Stable Diffusion has it, and as it is now.

    Not where something is around its convolution (a LoRA, a hook), or it is dilated.
    """
    conv = layer.conv
    if not (layer.use_conv and layer.interpolate and layer.norm is None):
        return False
    if type(conv) not in (nn.Conv2d, BandConv2d) or conv.padding_mode != "zeros":
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and not has_hooks(conv)


class BandGroupNorm(nn.GroupNorm):
    """A group norm over all bands: one all-reduce of [count, sum, sum of squares] per group."""

    traffic_kind = "group norm"

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same; the dimensions behind C are this band's share of the picture."""
        exchange = current_exchange()
        if exchange is None:
            return super().forward(input)
        mean, variance = global_statistics(self, exchange, [input])
        return normalise(self, input, mean, variance)


class FusedGroupNorm(BandGroupNorm):
    """The same, on bands or not, by the kernels of `engine.kernels.norms` where they can do it.

    Blocks that call a norm and then SiLU look for this class, and have both done at once.
    """

    fused = True

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same"""
        exchange = current_exchange()
        if exchange is None and not can_fuse(self, input):
            return super().forward(input)
        x = by_tokens(self, input)
        mean, variance = global_statistics(self, exchange, [x])
        return normalise(self, x, mean, variance)


def by_tokens(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """`x` as the norm's kernels take it, if they are to; most often it is so already."""
    if not (isinstance(norm, FusedGroupNorm) and x.ndim == 4):
        return x
    return x if norms.is_by_tokens(x) else x.contiguous(memory_format=torch.channels_last)


def global_statistics(
    norm: nn.GroupNorm,
    exchange: Exchange | None,
    parts: list[Tensor],
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, groups] over all bands, in the dtype to normalise in.

    Args:
        parts: [B, C_i, ...] each, whose channels one after the other are what `norm` is for: a
            group may lie across two of them.
        shift: [B or 1, C], what is still to be added to the channels.
    """
    if exchange is not None:
        return exchange.statistics(norm, parts, norm.num_groups, shift)
    mean, variance = mean_and_variance(moments(parts, norm.num_groups, shift, is_fused(norm)))
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    return mean.to(dtype), variance.clamp(min=0).to(dtype)


def normalise(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, as a batch norm of B * C channels.

    That is torch's one fused kernel which takes statistics from outside.
    """
    if can_fuse(norm, x):
        return norms.group_norm(norm, by_tokens(norm, x), mean, variance)
    batch, channels = x.shape[:2]
    per_channel = channels // norm.num_groups
    normalised = F.batch_norm(
        x.reshape(1, batch * channels, -1),
        mean.flatten().repeat_interleave(per_channel),
        variance.flatten().repeat_interleave(per_channel),
        None if norm.weight is None else norm.weight.to(mean.dtype).repeat(batch),
        None if norm.bias is None else norm.bias.to(mean.dtype).repeat(batch),
        eps=norm.eps,
    )
    return normalised.view(x.shape)


def normalise_and_activate(
    norm: nn.GroupNorm,
    activate: Callable[[Tensor], Tensor],
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    out: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """activate(normalise(x + shift)), by one kernel where the norm is fused and SiLU behind it.

    What travels between ranks has travelled before, so that each rank may choose by itself.

    Args:
        x: [B, C, h, W]
        mean, variance: [B, groups], of x + shift.
        out: [B, C, h, W], of any strides, to write into.
        shift: [B or 1, C]
    """
    is_silu = type(activate) is nn.SiLU and not has_hooks(activate)
    if is_silu and can_fuse(norm, x) and (out is None or norms.is_by_tokens(out)):
        x = by_tokens(norm, x)
        return norms.group_norm(norm, x, mean, variance, True, shift, out)
    x = x if shift is None else x + shift[:, :, None, None]
    y = activate(normalise(norm, x, mean, variance))
    return y if out is None else out.copy_(y)


def can_fuse(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Whether a kernel does what this norm does to [B, C, h, W]."""
    whole = (norm.weight is None) == (norm.bias is None)
    chosen = isinstance(norm, FusedGroupNorm) and not has_hooks(norm)
    return chosen and whole and x.ndim == 4 and has_kernels(x)


# These compute the same function, by slices or by another kernel; bands do it their own way.
_PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


def require_plain_processor(name: str, attention: Attention) -> None:
    """Refuse a processor that does something else than attend, since bands would ignore it.

    Raises:
        UserError: naming the processor.
    """
    processor = type(attention.processor)
    if processor not in _PLAIN_PROCESSORS:
        raise UserError(
            f"{name} uses {processor.__name__}, which has no exact form over bands: remove that "
            "attachment, or paint on one rank"
        )


class BandSelfAttention(Attention):  # type: ignore[misc]
    """Softmax self-attention: this band's queries against the keys and values of all bands.

    For networks without LinFusion modules and for the VAE's mid-block. The gathered keys and values
    grow with the picture; that is what linear attention is there to avoid.
    """

    traffic_kind = "softmax attention"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """[B, n, C] or [B, C, h, W] -> the same."""
        exchange = current_exchange()
        if exchange is None or encoder_hidden_states is not None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        assert attention_mask is None, "no diffusers UNet masks its self-attention"
        require_plain_processor("a self-attention", self)  # some pipelines set theirs when called
        tokens = (
            hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        )
        mixed = self._attend(exchange, tokens)
        if hidden_states.ndim == 4:
            mixed = mixed.transpose(1, 2).reshape(hidden_states.shape)
            mixed = mixed.contiguous(memory_format=layout_of(hidden_states))
        if self.residual_connection:
            mixed = mixed + hidden_states
        return mixed / self.rescale_output_factor

    def _attend(self, exchange: Exchange, tokens: Tensor) -> Tensor:
        """[B, n, C] -> [B, n, C], as diffusers' AttnProcessor2_0 but with everybody's keys."""
        if self.group_norm is not None:
            tokens = self.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        both = exchange.gather(self, torch.cat([key, value], dim=-1), dim=1)
        key, value = both.tensor_split([key.shape[-1]], dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).to(query.dtype)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))
