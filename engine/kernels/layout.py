"""How pictures lie in memory: channel after channel, or side by side (`channels_last`)."""

from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F


def has_hooks(layer: nn.Module) -> bool:
    """Whether something happens when `layer` is called, such as its weights being fetched."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def layout_of(x: Tensor) -> torch.memory_format:
    """That of a picture [B, C, h, W], or of some rows of one."""
    by_tokens = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if by_tokens else torch.contiguous_format


def room_for(x: Tensor, height: int) -> Tensor:
    """For `height` rows of what `x` has some of, in its layout: [B, C, height, W]"""
    shape = (*x.shape[:2], height, x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def join_rows(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """[B, C, h_i, W] one below the other, in the layout of `like`.

    Where layouts differ, torch would join them in the default one; and where all of them lie side
    by side, it is many times as fast if they are shown to it as [B, h_i, W, C].
    """
    pieces = [piece for piece in pieces if piece.shape[2]] or [pieces[0]]
    planes = torch.contiguous_format
    if layout_of(like) == planes:
        return torch.cat([p if layout_of(p) == planes else p.contiguous() for p in pieces], dim=2)
    return torch.cat([piece.permute(0, 2, 3, 1) for piece in pieces], 1).permute(0, 3, 1, 2)


class TokensTransformer2D(Transformer2DModel):  # type: ignore[misc]
    """A transformer around whose blocks nothing is copied: for pictures that lie channels last.

    Those are tokens already, and SD-1.5's 1x1 convolutions are linear layers.
    """

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        """[B, C, h, W] -> ([B, h W, C'], C')"""
        picture = self.norm(hidden_states)
        tokens = self._project(self.proj_in, picture.permute(0, 2, 3, 1)).flatten(1, 2)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        """[B, h W, C] -> [B, C, h, W], added to `residual`."""
        tokens = hidden_states.unflatten(1, (height, width))
        return self._project(self.proj_out, tokens).permute(0, 3, 1, 2) + residual

    def _project(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """[B, h, W, C] -> [B, h, W, C']"""
        if self.use_linear_projection:
            return layer(tokens)
        if isinstance(layer, nn.Conv2d) and not has_hooks(layer):
            return F.linear(tokens, layer.weight.flatten(1), layer.bias)
        return layer(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
