"""LinFusion's attention by C x C products over blocks of tokens: the same in less time and memory.

As it is published, the module writes and reads n x C numbers some thirty times beside its matrix
products. Here each block of tokens goes all the way while it is in the cache, and what is left
beside the products works in place:

    a      = LeakyReLU(LN(W1 x + b1))         the hidden layer of the MLP of keys (or queries)
    y      = x + W2 a                         one product that accumulates; b2 waits ...
    phi(k) = phi(Wk y + (Wk b2 + bk))         ... for the bias behind it
    A     += phi(k)^T x                       and phi(k)^T v = A Wv^T by heads: no token has a v
    M      = S Wo^T by heads                  the state and the output projection become one:
    out    = (phi(q) / z^T phi(q)) M + bo     no token is split into heads

So there are eight C x C products, four before the ranks' sum and four behind it, and nothing else
that grows with the width's square. In fp32 and fp64 only: A is as large as the sums of n tokens,
which half precision does not hold. Weights with attachments (LoRA, offload hooks) are left to the
plain module, and so are gradients.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.kernels.formula import NORMALISER_EPS
from engine.kernels.norms import FusedLayerNorm

BLOCK_TOKENS = 512
"""of 640 channels in fp32 these are 1.3 MB"""
_MOST_BLOCKS = 256  # of a picture, so that planning it does not take longer than painting it


class Module(Protocol):
    """What a `LinearAttention` consists of."""

    heads: int
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList
    to_q_: nn.Module
    to_k_: nn.Module


def can_stream(module: Module) -> bool:
    """Whether the module, as it is now, computes nothing but what is written above."""
    weight, device = module.to_q.weight, module.to_q.weight.device.type
    if weight.dtype not in (torch.float32, torch.float64) or torch.is_grad_enabled():
        return False
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    linear = (module.to_q, module.to_k, module.to_v, module.to_out[0])
    return are_plain(*linear, module.to_q_, module.to_k_)


def are_plain(*layers: nn.Module) -> bool:
    """Whether nothing is attached to these linear layers, and MLPs of them."""
    each = (part for m in layers for part in (m if isinstance(m, nn.Sequential) else [m]))
    return all(_is_plain(layer) for layer in each if not isinstance(layer, nn.Identity))


def _is_plain(layer: nn.Module) -> bool:
    kinds = (nn.Linear, nn.LayerNorm, FusedLayerNorm, nn.LeakyReLU)
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) in kinds and not hooked


def state(module: Module, tokens: Iterable[Tensor]) -> tuple[Tensor, int]:
    """phi(k)^T [v, 1] of all tokens, unnormalised, and how many they are.

    Args:
        tokens: in chunks [B, n, C].

    Returns:
        ([B, heads, d, d+1], n)
    """
    products: Tensor | None = None
    count = 0
    for chunk in tokens:
        if products is None:
            inner, width = module.to_k.weight.shape
            products = chunk.new_zeros(len(chunk), inner, width)
            sums = chunk.new_zeros(len(chunk), inner)
        bias = bias_behind(module.to_k_, module.to_k)
        for picture, product, total in zip(chunk, products, sums, strict=True):
            for block in _blocks(picture):
                phi = _phi(block, module.to_k_, module.to_k, bias)
                product.addmm_(phi.t(), block)
                total += phi.sum(0)
        count += chunk.shape[1]
    assert products is not None, "there are tokens"
    return _with_values(module, products, sums), count


def _with_values(module: Module, products: Tensor, sums: Tensor) -> Tensor:
    """phi(k)^T [v, 1] by heads, from phi(k)^T x [B, C, C] and the sums of phi(k) [B, C]."""
    heads = module.heads
    weight = module.to_v.weight.unflatten(0, (heads, -1)).transpose(-2, -1)
    values = products.unflatten(1, (heads, -1)) @ weight
    sums = sums.unflatten(1, (heads, -1)).unsqueeze(-1)
    if module.to_v.bias is not None:
        values += sums * module.to_v.bias.view(heads, 1, -1)
    return torch.cat([values, sums], dim=-1)


def attend(module: Module, tokens: Tensor, mean_state: Callable[[], Tensor]) -> Tensor:
    """[B, n, C] -> [B, n, C]: what these tokens read from the state of all.

    The state is waited for behind the queries of the first block, as long as which it may travel.
    """
    to_out = module.to_out[0]
    assert isinstance(to_out, nn.Linear)
    out = tokens.new_empty(*tokens.shape[:2], to_out.out_features)
    bias = bias_behind(module.to_q_, module.to_q)
    mixers = None
    for index, (picture, result) in enumerate(zip(tokens, out, strict=True)):
        for block, rows in zip(_blocks(picture), _blocks(result), strict=True):
            phi = _phi(block, module.to_q_, module.to_q, bias)
            if mixers is None:
                mixers, normalisers = _mixers(to_out, module.heads, mean_state())
            norms = (phi @ normalisers[index]).add_(NORMALISER_EPS)
            phi.unflatten(1, (module.heads, -1)).div_(norms.unsqueeze(-1))
            torch.mm(phi, mixers[index], out=rows)
            if to_out.bias is not None:
                rows += to_out.bias
    return out


def _mixers(to_out: nn.Linear, heads: int, mean_state: Tensor) -> tuple[Tensor, Tensor]:
    """(M, z) of every picture: [B, heads * d, C] and, for products, [B, heads * d, heads]."""
    weight = to_out.weight.t().unflatten(0, (heads, -1))
    mixers = (mean_state[..., :-1] @ weight).flatten(1, 2)
    return mixers, _block_diagonal(mean_state[..., -1])


def _block_diagonal(sums: Tensor) -> Tensor:
    """[B, heads, d] -> [B, heads * d, heads], with which a product sums up each head by itself."""
    batch, heads, width = sums.shape
    matrix = sums.new_zeros(batch, heads, width, heads)
    matrix.diagonal(dim1=1, dim2=3).copy_(sums.transpose(1, 2))
    return matrix.flatten(1, 2)


def _phi(x: Tensor, mlp: nn.Module, linear: nn.Linear, bias: Tensor | None) -> Tensor:
    """phi(W (x + MLP(x))), [b, C] -> [b, C]; `bias` has what the MLP's last one comes to."""
    if isinstance(mlp, nn.Sequential):
        first, norm, slope, last = parts_of(mlp)
        hidden = F.linear(x, first.weight, first.bias)
        hidden = F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        hidden = F.leaky_relu_(hidden, slope.negative_slope)
        y = torch.addmm(x, hidden, last.weight.t())
    else:
        y = x + x
    return _feature_map_(F.linear(y, linear.weight, bias))


def parts_of(mlp: nn.Sequential) -> tuple[nn.Linear, nn.LayerNorm, nn.LeakyReLU, nn.Linear]:
    """The layers of a non-linear projection."""
    first, norm, slope, last = mlp
    assert isinstance(first, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(slope, nn.LeakyReLU)
    assert isinstance(last, nn.Linear)
    return first, norm, slope, last


def bias_behind(mlp: nn.Module, linear: nn.Linear) -> Tensor | None:
    """W b2 + b: what the bias of the MLP's last layer is behind the projection."""
    inner = mlp[-1].bias if isinstance(mlp, nn.Sequential) else None
    if not isinstance(inner, Tensor):
        return linear.bias
    return F.linear(inner, linear.weight, linear.bias)


def _feature_map_(x: Tensor) -> Tensor:
    """phi(x) = max(x, 0) + exp(min(x, 0)) in place: elu(x) + 1 without its cancellation."""
    positive = x.relu()
    return x.clamp_(max=0).exp_().add_(positive)


def _blocks(tokens: Tensor) -> Iterator[Tensor]:
    """Views of [n, C]."""
    return iter(tokens.split(max(BLOCK_TOKENS, -(-len(tokens) // _MOST_BLOCKS))))
