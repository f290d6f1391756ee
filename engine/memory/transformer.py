"""The UNet's transformers in chunks of tokens, written over their own input.

At 16384 px the first transformer of SD-1.5 sees 4 million tokens [B, n, 320], 2.7 GB in fp16, and
its feed-forward widens them eightfold: 21 GB, and as much again for the gate's activation and its
product. But a feed-forward looks at one token at a time, so does cross-attention (at the same few
words of text), and so do the queries of linear attention, once its state is known. So a block is

    over chunks    state += phi(k)^T [v, 1]      k, v of norm1(chunk); then one all-reduce
    over chunks    chunk += attend(norm1(chunk), state)
                   chunk += cross-attention(norm2(chunk), text)
                   chunk += feed-forward(norm3(chunk))

with nothing held whole but the tokens themselves. norm1 of a chunk is computed twice, at little
cost.

diffusers has `enable_forward_chunking`, for the feed-forward alone, with one chunk size for all
levels that must divide the number of tokens of each. Ragged bands have no such size; here it is a
number of chunks, nearly equal ones, at any level and for any number of tokens.

Softmax self-attention looks from all tokens at all others, and stays whole.
"""

from collections.abc import Callable
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from engine.bands import current_exchange
from engine.bands.chunks import split_evenly
from engine.bands.layers import global_statistics, normalise
from engine.kernels.pointwise import FusedGEGLU, geglu, plain_geglu
from engine.linfusion import LinearAttention

# These treat each query by itself; others may keep maps of all, as attention editors do.
_QUERYWISE = (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)


class InplaceGEGLU(GEGLU):  # type: ignore[misc]
    """A gated linear unit that multiplies in place."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[B, n, C] -> [B, n, 4 C]"""
        return plain_geglu(self.proj(hidden_states), in_place=True)


class FusedInplaceGEGLU(FusedGEGLU):
    """The same in one pass, without room for the activated gate."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[B, n, C] -> [B, n, 4 C]"""
        return geglu(self.proj(hidden_states), in_place=True)


class ChunkedTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]
    """Self-attention, cross-attention and feed-forward over chunks of tokens, in place.

    Attributes:
        token_chunks: how many.
    """

    token_chunks: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, n, C] -> [B, n, C], the same tensor."""
        options = dict(cross_attention_kwargs or {})
        assert "gligen" not in options, "refused by name in `engine.memory.apply`"
        self._attend_to_self(hidden_states, attention_mask, options)
        if self.attn2 is not None:

            def attend(tokens: Tensor) -> Tensor:
                return self.attn2(
                    self.norm2(tokens),
                    encoder_hidden_states=encoder_hidden_states,
                    attention_mask=encoder_attention_mask,
                    **options,
                )

            chunks = self.token_chunks if _is_querywise(self.attn2, options) else 1
            _add_chunks(hidden_states, attend, chunks)
        _add_chunks(hidden_states, lambda tokens: self.ff(self.norm3(tokens)), self.token_chunks)
        return hidden_states

    def _attend_to_self(
        self, hidden: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        attention = self.attn1
        if not isinstance(attention, LinearAttention) or attention_mask is not None:
            hidden += attention(self.norm1(hidden), attention_mask=attention_mask, **options)
            return
        chunks = _chunks(hidden, self.token_chunks)
        state = attention.mean_state(self.norm1(chunk) for chunk in chunks)
        _add_chunks(
            hidden, lambda tokens: attention.attend(self.norm1(tokens), state), self.token_chunks
        )


def _is_querywise(attention: Attention, options: dict[str, Any]) -> bool:
    # An IP-Adapter's masks say for each query what it may see, and are sized for all of them.
    masked = options.get("ip_adapter_masks") is not None
    return type(attention.processor) in _QUERYWISE and not masked


def _chunks(tokens: Tensor, chunks: int) -> list[Tensor]:
    """Views of [B, n, C] along n."""
    return [tokens[:, c.start : c.stop] for c in split_evenly(tokens.shape[1], chunks)]


def _add_chunks(tokens: Tensor, function: Callable[[Tensor], Tensor], chunks: int) -> None:
    """tokens += function(tokens), chunk by chunk."""
    for chunk in _chunks(tokens, chunks):
        chunk += function(chunk)


class ChunkedTransformer2D(Transformer2DModel):  # type: ignore[misc]
    """What surrounds the blocks, by chunks of rows: pixels to tokens, and tokens added to pixels.

    Attributes:
        token_chunks: how many.
    """

    token_chunks: int

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """[B, C, h, W] -> the same tensor, which is nobody else's: a residual block made it."""
        tokens = self._to_tokens(hidden_states)
        for block in self.transformer_blocks:
            tokens = block(
                tokens,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                cross_attention_kwargs=cross_attention_kwargs,
            )
        output = self._add_tokens(hidden_states, tokens)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """proj_in(norm(x)) as tokens [B, h W, C']: a row after the other."""
        mean, variance = global_statistics(self.norm, current_exchange(), [x])
        width, tokens = x.shape[3], None
        for rows in split_evenly(x.shape[2], self.token_chunks):
            piece = normalise(self.norm, x[:, :, rows.start : rows.stop], mean, variance)
            y = self._project(self.proj_in, piece.flatten(2).transpose(1, 2))
            if tokens is None:
                tokens = y.new_empty(len(x), x.shape[2] * width, y.shape[2])
            tokens[:, rows.start * width : rows.stop * width] = y
        assert tokens is not None
        return tokens

    def _add_tokens(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x + proj_out(tokens)"""
        width = x.shape[3]
        for rows in split_evenly(x.shape[2], self.token_chunks):
            y = self._project(self.proj_out, tokens[:, rows.start * width : rows.stop * width])
            x[:, :, rows.start : rows.stop] += y.transpose(1, 2).unflatten(2, (-1, width))
        return x

    def _project(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """[B, n, C] -> [B, n, C'], by a linear layer or, in SD-1.5, a 1x1 convolution."""
        if self.use_linear_projection:
            return layer(tokens)
        return layer(tokens.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
