"""The layers that look beyond their own rows, each a subclass with the plain layer's constructor.

`engine.distribute` swaps the class of a network's layers in place (`layer.__class__ = BandConv2d`):
names, weights, hooks and state-dict keys stay as they were, and a LoRA library that builds
`type(layer)(...)` builds banded layers too. Outside of `banded(...)` each is the plain layer.
"""

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bands.context import current_exchange
from engine.bands.exchange import Exchange, mean_and_variance, moments
from engine.bands.rows import halo_rows
from engine.config import UserError

_MAX_ELEMENTS = 2**31 - 1  # what 32-bit indices reach, in convolution kernels


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
            input, padding = self._with_halo(exchange, input), (0, padding[1])
        elif self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        return self._convolve(input, weight, bias, padding)

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        """The plain convolution of [B, C, h, W], by chunks of rows where it or the result is large.

        A chunk of output rows i ... j - 1 reads the rows i * stride - padding and on, and what of
        these lies beyond the edges of x is the convolution's zeros.
        """
        batch, channels, height, width = x.shape
        options = (self.stride, (0, padding[1]), self.dilation, self.groups)
        stride, reach = self.stride[0], self.dilation[0] * (self.kernel_size[0] - 1) + 1
        rows = (height + 2 * padding[0] - reach) // stride + 1
        row_elements = batch * width * max(channels * stride, len(weight))
        rows_at_once = max(1, _MAX_ELEMENTS // row_elements - reach)
        if rows <= rows_at_once:
            return F.conv2d(x, weight, bias, self.stride, padding, *options[2:])
        chunks = []
        for start in range(0, rows, rows_at_once):
            first = start * stride - padding[0]
            last = (min(start + rows_at_once, rows) - 1) * stride - padding[0] + reach
            zeros = (0, 0, max(0, -first), max(0, last - height))
            piece = F.pad(x[:, :, max(0, first) : last], zeros)
            chunks.append(F.conv2d(piece, weight, bias, *options))
        return torch.cat(chunks, dim=2)

    def _with_halo(self, exchange: Exchange, x: Tensor) -> Tensor:
        """`x` between its neighbours' rows, or the convolution's zeros at the picture's edges."""
        above, below = self.halo_rows()
        over, under = exchange.halo(self, x, above, below)
        batch, channels, _, width = x.shape
        zeros = x.new_zeros(batch, channels, int(self.padding[0]), width)
        return torch.cat([zeros if over is None else over, x, zeros if under is None else under], 2)


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


class BandResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """The VAE's residual block, where rows that were convolved meet rows that were not.

    On whole bands both are equally many. In a stream the convolutions are a few rows late, so the
    rows that go around them wait for as long: `Exchange.delay`.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, C, h, W] -> [B, C', h', W]"""
        exchange = current_exchange()
        if exchange is None:
            return super().forward(input_tensor, temb)
        assert temb is None, "a VAE has no time"
        assert self.upsample is self.downsample is None
        around = exchange.delay(self, input_tensor)
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        shortcut = around(hidden.shape[2])
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        return (shortcut + hidden) / self.output_scale_factor


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


def global_statistics(
    norm: nn.GroupNorm, exchange: Exchange | None, parts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, groups] over all bands, in the dtype to normalise in.

    Args:
        parts: [B, C_i, ...] each, whose channels one after the other are what `norm` is for: a
            group may lie across two of them.
    """
    if exchange is not None:
        return exchange.statistics(norm, parts, norm.num_groups)
    mean, variance = mean_and_variance(moments(parts, norm.num_groups))
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    return mean.to(dtype), variance.clamp(min=0).to(dtype)


def normalise(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, as a batch norm of B * C channels.

    That is the one fused kernel which takes statistics from outside.
    """
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
