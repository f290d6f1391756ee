"""Generalised linear attention as it is meant, head by head (arXiv:2409.02097, section 3).

    out_i = S^T phi(q_i) / (z^T phi(q_i) + 1e-4),  S = mean_j phi(k_j) v_j^T,  z = mean_j phi(k_j)

In any precision, and differentiable: sums are kept in fp32 at least, a block of tokens at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# The reference adds this to the normaliser, on the *mean* of phi(k); trained weights expect it.
NORMALISER_EPS = 1e-4

_BLOCK_TOKENS = 65536
_CHUNK_TOKENS = 1024


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1 > 0, without the cancellation of `F.elu(x) + 1` for negative x.

    In fp16 `elu(-8) + 1` is wrong by 46 %, in bf16 it is zero from -7 on; exp(x) is right.
    """
    # exp() of the clamped x: where() evaluates both sides, and inf * 0 would poison gradients.
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def attention_state(key: Tensor, value: Tensor) -> Tensor:
    """phi(k)^T [v, 1] of these tokens, unnormalised: [B, heads, n, d] twice -> [B, heads, d, d+1].

    In fp32 at least: an unscaled fp16 sum of phi(k) overflows from about 57,000 tokens. Block by
    block: only one block's phi(k) and v are ever held in fp32.
    """
    blocks = zip(key.split(_BLOCK_TOKENS, dim=-2), value.split(_BLOCK_TOKENS, dim=-2), strict=True)
    return sum((_block_state(*block) for block in blocks), start=torch.zeros((), device=key.device))


def _block_state(key: Tensor, value: Tensor) -> Tensor:
    """The state of one block, summed up in chunks: a chain of fp32 sums loses a digit in 100."""
    accumulate = torch.promote_types(value.dtype, torch.float32)
    phi_k = feature_map(key.to(accumulate)).transpose(-2, -1)
    value_and_one = F.pad(value.to(accumulate), (0, 1), value=1.0)
    tokens = key.shape[-2]
    chunks = tokens // _CHUNK_TOKENS
    cut = chunks * _CHUNK_TOKENS
    rest = phi_k[..., cut:] @ value_and_one[..., cut:, :]
    if not chunks:
        return rest
    chunked_k = phi_k[..., :cut].unflatten(-1, (chunks, -1)).movedim(-2, -3)
    chunked_v = value_and_one[..., :cut, :].unflatten(-2, (chunks, -1))
    return (chunked_k @ chunked_v).sum(-3) + rest


def apply_state(query: Tensor, mean_state: Tensor) -> Tensor:
    """phi(q) S / (phi(q) z + eps) with [S, z] = `mean_state`, the state divided by all tokens.

    [B, heads, n, d] and [B, heads, d, d+1] -> [B, heads, n, d] in the dtype of `query`. The
    numerator can overflow fp16 before the division, so it is not rounded before it.
    """
    blocks = [_apply_to_block(q, mean_state) for q in query.split(_BLOCK_TOKENS, dim=-2)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)


def _apply_to_block(query: Tensor, mean_state: Tensor) -> Tensor:
    """`apply_state` for as many queries as are held in fp32 at once."""
    both = feature_map(query.to(mean_state.dtype)) @ mean_state
    numerator, normaliser = both[..., :-1], both[..., -1:]
    return (numerator / (normaliser + NORMALISER_EPS)).to(query.dtype)
