"""Token mixers on the way from a state space model to linear attention, as the paper went it.

LinFusion (arXiv:2409.02097, section 3.2) begins with Mamba2 (arXiv:2405.21060), scanned in both
directions, and changes it until it is a linear attention. With q, k and v of the teacher's own
projections and phi(x) = elu(x) + 1, what token i puts out is, up to the projection at the end,

    SSM                     sum_j w_ij phi(q_i) phi(k_j) v_j / d, over tokens before and after i:
                            w_ij = dt_j exp(-a (dt_(j+1) + ... + dt_i)) is the decay from j to i;
                            then Mamba2's skip, gate and norm
    without gate and norm   the same without these two
    normalised SSM          the same, divided by sum_j w_ij phi(q_i) phi(k_j): the paper's
                            normalisation-aware Mamba
    normalised, non-causal  w_j instead of w_ij, a softmax over all tokens
    linear attention        no w; small MLPs on q and k instead (`engine.linfusion`)
    unnormalised            linear attention without the division

Of Mamba2, the short convolution is left out and each head has a k and a q of its own, as the
teacher has; phi takes the place of its SiLU, so that weights are positive in all of them and each
differs from the one before by what its name says.
"""

import math
from typing import Any, Self

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from engine.kernels.formula import feature_map
from engine.linfusion import LinearAttention

CHUNK = 64
"""tokens that are compared pair by pair; their sum is handed on to the next chunk"""


# --- the scan -------------------------------------------------------------------------------------


def scan(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, chunk: int = CHUNK) -> Tensor:
    """sum over j <= i of exp(decay_(j+1) + ... + decay_i) (q_i k_j) v_j, in linear time.

    The chunked form of Mamba2 (arXiv:2405.21060, section 6).

    Args:
        query, key: [B, heads, n, d]
        value: [B, heads, n, e]
        decay: [B, heads, n], logarithms, none above 0

    Returns: [B, heads, n, e]
    """
    tokens = query.shape[-2]
    chunk = min(chunk, tokens)
    ragged = -tokens % chunk
    query, key, value = (
        F.pad(x, (0, 0, 0, ragged)).unflatten(-2, (-1, chunk)) for x in (query, key, value)
    )
    since = F.pad(decay, (0, ragged)).unflatten(-1, (-1, chunk)).cumsum(-1)
    between = since[..., :, None] - since[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    # Before exp(), not after it: what is to come would grow without bound.
    weights = between.masked_fill(later, -math.inf).exp()
    inside = (query @ key.mT * weights) @ value
    before = _states(key, value, since)
    return (inside + (query * since.exp()[..., None]) @ before).flatten(-3, -2)[..., :tokens, :]


def _states(key: Tensor, value: Tensor, since: Tensor) -> Tensor:
    """What each chunk finds left of all those before it, [B, heads, chunks, d, e]."""
    to_end = (since[..., -1:] - since).exp()
    gained = (key * to_end[..., None]).mT @ value
    kept = since[..., -1].exp()[..., None, None]
    states = [torch.zeros_like(gained[:, :, 0])]
    for number in range(gained.shape[2] - 1):
        states.append(states[-1] * kept[:, :, number] + gained[:, :, number])
    return torch.stack(states, 2)


def scan_naive(query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
    """What `scan` is held to: a state, token by token."""
    state = key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for i in range(key.shape[2]):
        gained = key[:, :, i, :, None] * value[:, :, i, None, :]
        state = decay[:, :, i, None, None].exp() * state + gained
        outputs.append((query[:, :, i, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2)


# --- the mixers -----------------------------------------------------------------------------------


class _Mixer(Attention):
    """Drop-in for the `attn1` of a diffusers transformer block; kinds say how tokens are mixed."""

    @classmethod
    def from_attention(cls, attention: Attention) -> Self:
        """One with the projections of a softmax attention."""
        mixer = cls(
            query_dim=attention.to_q.in_features,
            heads=attention.heads,
            dim_head=attention.to_q.out_features // attention.heads,
        )
        mixer.load_state_dict(attention.state_dict(), strict=False)
        weight = attention.to_q.weight
        return mixer.to(device=weight.device, dtype=weight.dtype).train(attention.training)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, n, C] -> [B, n, C]"""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = self.mix(hidden_states, feature_map(query), feature_map(key), value)
        return self.to_out[0](mixed)

    def mix(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, n, C] and thrice [B, heads, n, d] -> [B, n, heads * d]"""
        raise NotImplementedError


class NoMixer(_Mixer):
    """Nothing at all: what a self-attention must be better than."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class PlainSSM(_Mixer):
    """The scan in both directions, without gate and norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As Mamba2 begins: dt between 0.001 and 0.1, a between 1 and 16; here for both directions.
        dt = torch.exp(torch.empty(2 * self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.to_dt = nn.Linear(self.to_q.in_features, 2 * self.heads)
        with torch.no_grad():
            self.to_dt.bias.copy_(dt.expm1().log())  # softplus, backwards
        self.log_a = nn.Parameter(torch.empty(2 * self.heads).uniform_(1, 16).log())
        # Mamba2's begins with 1, but what the teacher's attention does begins without.
        self.skip = nn.Parameter(torch.zeros(self.heads))

    def mix(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = self.scan_both(tokens, query, key, value) + self.skip[:, None, None] * value
        return mixed.transpose(1, 2).flatten(2)

    def scan_both(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The sums over tokens before and after each, [B, heads, n, e]."""
        dt = F.softplus(self.to_dt(tokens)).transpose(1, 2)
        dt_ahead, dt_back = dt.chunk(2, 1)
        a_ahead, a_back = self.log_a.exp()[:, None].chunk(2)
        query = query / query.shape[-1]
        ahead = scan(query, key * dt_ahead[..., None], value, -a_ahead * dt_ahead)
        turned = (query.flip(-2), (key * dt_back[..., None]).flip(-2), value.flip(-2))
        return ahead + scan(*turned, (-a_back * dt_back).flip(-1)).flip(-2)


class BidirectionalSSM(PlainSSM):
    """The scan in both directions, with Mamba2's gate and norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.to_gate = nn.Linear(self.to_q.in_features, self.to_q.out_features)
        nn.init.zeros_(self.to_gate.weight)
        nn.init.constant_(self.to_gate.bias, 1.2785)  # where SiLU is 1: the gate is open at first
        self.norm_out = nn.RMSNorm(self.to_q.out_features, eps=1e-5)

    def mix(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = super().mix(tokens, query, key, value)
        return self.norm_out(mixed * F.silu(self.to_gate(tokens)))


class NormalisedSSM(PlainSSM):
    """The scan in both directions, its weights normalised so that they sum to one."""

    def scan_both(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        value_and_one = F.pad(value, (0, 1), value=1.0)
        return _normalised(super().scan_both(tokens, query, key, value_and_one))


class NonCausal(_Mixer):
    """All tokens in one state, each with a weight that it says itself; the weights sum to one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.to_weight = nn.Linear(self.to_q.in_features, self.heads, bias=False)
        nn.init.zeros_(self.to_weight.weight)

    def mix(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = self.to_weight(tokens).softmax(1).transpose(1, 2)
        state = (key * weights[..., None]).mT @ F.pad(value, (0, 1), value=1.0)
        return _normalised(query @ state).transpose(1, 2).flatten(2)


class UnnormalisedAttention(LinearAttention):
    """Linear attention without its normaliser; a learnt number for each head is in its place."""

    TOKENS = 64
    """What the number allows for at first: as many tokens as the demo's layers have at 128 px."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.to_q.out_features // self.heads
        self.log_scale = nn.Parameter(torch.full((self.heads,), -math.log(width * self.TOKENS)))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query = self._split_heads(self.to_q(hidden_states + self.to_q_(hidden_states)))
        key = self._split_heads(self.to_k(hidden_states + self.to_k_(hidden_states)))
        value = self._split_heads(self.to_v(hidden_states))
        mixed = feature_map(query) @ (feature_map(key).mT @ value)
        scaled = self.log_scale.exp()[:, None, None] * mixed
        return self.to_out[0](scaled.transpose(1, 2).flatten(2))


def _normalised(sums: Tensor) -> Tensor:
    """[..., e+1] -> [..., e]: divided by the last, which is the sum of the weights."""
    return sums[..., :-1] / (sums[..., -1:] + 1e-6)


MIXERS: dict[str, type[Attention]] = {
    "bidirectional SSM": BidirectionalSSM,
    "SSM without gate and norm": PlainSSM,
    "normalised SSM": NormalisedSSM,
    "normalised, non-causal": NonCausal,
    "linear attention": LinearAttention,
    "linear attention, unnormalised": UnnormalisedAttention,
}
