"""LinFusion's generalised linear attention: the module, mounting it, loading and saving it.

Softmax self-attention compares every pixel with every other one. LinFusion (Liu et al. 2024,
"1 GPU, 1 Minute, 16K Image", arXiv:2409.02097) replaces the comparison by a feature map
phi(x) = elu(x) + 1 and lets the sums swap places:

    out_i = S^T phi(q_i) / (z^T phi(q_i) + 1e-4),  S = mean_j phi(k_j) v_j^T,  z = mean_j phi(k_j)

S is d x d and z is d long for each head, whatever the size of the picture. When the picture lies
in bands on several ranks, each rank sums phi(k)^T [v, 1] over its own tokens, and one all-reduce of
that small matrix (`mean_over_bands`) is all that the ranks ever exchange for self-attention, and
it travels while they compute their queries.

The checkpoint layout is the published one (`Yuanshi/LinFusion-1-5`, `-2-1`, `-XL`): `config.json`
with a `modules_list`, and the tensors `0.to_q.weight`, `0.to_q_.0.weight`, ... in list order.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bands import mean_over_bands
from engine.config import UserError
from engine.kernels import fused, streamed
from engine.kernels.formula import apply_state, attention_state
from engine.kernels.norms import can_layer_norm, layer_norm

_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class LinearAttention(Attention):  # type: ignore[misc]
    """Drop-in for the `attn1` of a diffusers transformer block.

    Beside the four projections of `Attention` it has `to_q_` and `to_k_`, small MLPs added to the
    input of the query and key projections (arXiv:2409.02097, section 3.2: non-linear projections).
    It has its own `forward` and never asks its `processor`, since attachments such as IP-Adapter
    re-create processors by class and would lose weights that lived there.
    """

    traffic_kind = "linear attention"

    def __init__(self, *args: Any, projection_mid_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.to_q_ = _nonlinear_projection(self.to_q.in_features, projection_mid_dim)
        self.to_k_ = _nonlinear_projection(self.to_q.in_features, projection_mid_dim)

    @classmethod
    def from_attention(cls, attention: Attention, projection_mid_dim: int | None = None) -> Self:
        """A linear attention with the weights of a softmax one: where distillation starts.

        The MLPs end in zeros, so that queries and keys are at first those of `attention`.
        """
        linear = cls(
            query_dim=attention.to_q.in_features,
            heads=attention.heads,
            dim_head=attention.to_q.out_features // attention.heads,
            projection_mid_dim=projection_mid_dim,
        )
        linear.load_state_dict(attention.state_dict(), strict=False)
        for mlp in (linear.to_q_, linear.to_k_):
            if isinstance(mlp, nn.Sequential):
                last = mlp[-1]
                assert isinstance(last, nn.Linear)
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        weight = attention.to_q.weight
        return linear.to(device=weight.device, dtype=weight.dtype).train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """[B, n, C] -> [B, n, C], n being this band's tokens. Self-attention only, no mask."""
        assert encoder_hidden_states is None, "linear attention replaces self-attention only"
        assert attention_mask is None, "linear attention has no pairwise scores to mask"
        return self.attend(hidden_states, self.mean_state([hidden_states]))

    def mean_state(self, tokens: Iterable[Tensor]) -> Callable[[], Tensor]:
        """[S, z] over all bands' tokens, of which this band's come in chunks [B, n, C].

        On its way when this returns; the function returned waits for it.
        """
        return mean_over_bands(self, *self._state(tokens))

    def _state(self, tokens: Iterable[Tensor]) -> tuple[Tensor, int]:
        """This band's state, unnormalised, and how many tokens it is of."""
        if self._can_stream():
            return streamed.state(self, tokens)
        states, count = [], 0
        for chunk in tokens:
            key = self._split_heads(self._project(chunk, self.to_k_, self.to_k))
            value = self._split_heads(self.to_v(chunk))
            with _no_autocast(chunk.device):
                states.append(self._sum_up(key, value))
            count += chunk.shape[1]
        return sum(states[1:], start=states[0]), count

    def attend(self, tokens: Tensor, mean_state: Callable[[], Tensor]) -> Tensor:
        """[B, n, C] -> [B, n, C]: what these tokens, all or some, read from the state.

        The state is waited for once the queries are there.
        """
        if self._can_stream():
            return streamed.attend(self, tokens, mean_state)
        query = self._split_heads(self._project(tokens, self.to_q_, self.to_q))
        with _no_autocast(tokens.device):
            mixed = self._read(query, mean_state())
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))

    def _can_stream(self) -> bool:
        return streamed.can_stream(self)

    def _project(self, tokens: Tensor, mlp: nn.Module, linear: nn.Linear) -> Tensor:
        """[B, n, C] -> [B, n, heads * d]: queries or keys."""
        return linear(tokens + mlp(tokens))

    def _sum_up(self, key: Tensor, value: Tensor) -> Tensor:
        """[B, heads, n, d] twice -> [B, heads, d, d+1]"""
        return attention_state(key, value)

    def _read(self, query: Tensor, mean_state: Tensor) -> Tensor:
        """[B, heads, n, d], [B, heads, d, d+1] -> [B, heads, n, d]"""
        return apply_state(query, mean_state)

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, n, heads * d] -> [B, heads, n, d]"""
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)


class FusedLinearAttention(LinearAttention):
    """The same by the kernels of `engine.kernels.fused`, where they can compute it.

    In fp64, with gradients and on a device that has none of them it is the plain module.
    """

    def _can_stream(self) -> bool:
        return not self._can_fuse(self.to_q.weight) and super()._can_stream()

    def _project(self, tokens: Tensor, mlp: nn.Module, linear: nn.Linear) -> Tensor:
        """As `engine.kernels.streamed` has it, all tokens at once: less is written and read."""
        if not (isinstance(mlp, nn.Sequential) and streamed.are_plain(mlp, linear)):
            return super()._project(tokens, mlp, linear)
        if not (fused.has_kernels(tokens) and tokens.is_contiguous()):
            return super()._project(tokens, mlp, linear)
        first, norm, leaky, last = streamed.parts_of(mlp)
        flat = tokens.flatten(0, 1)
        hidden = F.linear(flat, first.weight, first.bias)
        if can_layer_norm(norm, hidden):
            hidden = layer_norm(norm, hidden, leaky.negative_slope, out=hidden)
        else:
            hidden = leaky(norm(hidden))
        summed = torch.addmm(flat, hidden, last.weight.t())
        bias = streamed.bias_behind(mlp, linear)
        return F.linear(summed, linear.weight, bias).unflatten(0, tokens.shape[:2])

    def _sum_up(self, key: Tensor, value: Tensor) -> Tensor:
        if self._can_fuse(key, value):
            return fused.fused_state(key, value)
        return super()._sum_up(key, value)

    def _read(self, query: Tensor, mean_state: Tensor) -> Tensor:
        if self._can_fuse(query, mean_state):
            return fused.fused_apply(query, mean_state)
        return super()._read(query, mean_state)

    def _can_fuse(self, *tensors: Tensor) -> bool:
        width = self.to_q.weight.shape[0] // self.heads
        return all(fused.can_compute(x, width) for x in tensors)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast would take the sums back to half precision, where they overflow."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _nonlinear_projection(dim: int, mid_dim: int | None) -> nn.Module:
    """The MLP of `to_q_` and `to_k_`; `mid_dim` None means `dim`, -1 means none (the identity)."""
    if mid_dim == -1:
        return nn.Identity()
    mid_dim = mid_dim or dim
    return nn.Sequential(
        nn.Linear(dim, mid_dim), nn.LayerNorm(mid_dim), nn.LeakyReLU(), nn.Linear(mid_dim, dim)
    )


def self_attentions(unet: nn.Module) -> Iterator[tuple[str, Attention]]:
    """(name, module) of every self-attention, softmax or linear, in the network's own order."""
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.rsplit(".", 1)[-1] == "attn1":
            yield name, module


def linearize(pipe: DiffusionPipeline, checkpoint: str | Path = "auto") -> None:
    """Mount LinFusion's linear attention on the UNet of `pipe`, in place.

    Args:
        checkpoint: a folder or hub id of LinFusion modules; "auto" takes those beside the model
            (its subfolder `linfusion`), else the published ones for a UNet of this shape.

    Raises:
        UserError: there are no such modules, or they are for a UNet of another shape.
    """
    model = pipe.config.get("_name_or_path") or ""
    load(pipe.unet, find_checkpoint(str(checkpoint), model, pipe.unet.config.cross_attention_dim))


def name_checkpoint(checkpoint: str, model: str, cross_attention_dim: int) -> str:
    """What `checkpoint` means where it is "auto": a folder beside the model, or a hub id."""
    if checkpoint != "auto":
        return checkpoint
    beside = Path(model) / "linfusion"
    return str(beside) if beside.is_dir() else published_for(cross_attention_dim)


def find_checkpoint(checkpoint: str, model: str, cross_attention_dim: int) -> Path:
    """The folder of LinFusion modules that `checkpoint` means; see `linearize`.

    Args:
        model: where the model comes from, a folder or a hub id.
        cross_attention_dim: how wide the text embeddings of its UNet are.

    Raises:
        UserError: there are no such modules.
    """
    checkpoint = name_checkpoint(checkpoint, model, cross_attention_dim)
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"LinFusion modules {checkpoint!r} are not readable: give a folder, a hub id, or "
            f"'none' for softmax attention ({reason})"
        ) from error


Mixer = Callable[[Attention], Attention]
"""what makes a self-attention of another kind from a softmax one"""


def convert(unet: nn.Module, mixer: Mixer = LinearAttention.from_attention) -> None:
    """Replace every softmax self-attention by a linear one with its weights, to be distilled.

    Args:
        mixer: makes the replacements, where they are to be of another kind.
    """
    for name, attention in list(self_attentions(unet)):
        unet.set_submodule(name, mixer(attention))


def save(unet: nn.Module, folder: Path) -> None:
    """Write the linear attentions of `unet` in LinFusion's published layout, dtype as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    modules_list, tensors = list_modules(unet), {}
    assert len(modules_list) == len(list(self_attentions(unet))), "some attention is not linear"
    for index, (_, attention) in enumerate(self_attentions(unet)):
        for key, tensor in attention.state_dict().items():
            tensors[f"{index}.{key}"] = tensor.contiguous()
    config = {"_class_name": "LinFusion", "modules_list": modules_list}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / _WEIGHTS_NAME, metadata={"format": "pt"})


def list_modules(unet: nn.Module) -> list[dict[str, Any]]:
    """The `modules_list` of the linear attentions of `unet`; empty where there are none."""
    return [
        _describe(name, attention)
        for name, attention in self_attentions(unet)
        if isinstance(attention, LinearAttention)
    ]


def _describe(name: str, attention: LinearAttention) -> dict[str, Any]:
    dim = attention.to_q.in_features
    mlp = attention.to_q_
    mid_dim = mlp[0].out_features if isinstance(mlp, nn.Sequential) else -1
    return {
        "module_name": name,
        "dim_n": dim,
        "heads": attention.heads,
        "projection_mid_dim": None if mid_dim == dim else mid_dim,
    }


def load(unet: nn.Module, folder: Path) -> None:
    """Mount the LinFusion modules in `folder` on `unet`, in place.

    Raises:
        UserError: the folder is no LinFusion checkpoint, or one for a network of another shape.
    """
    modules_list = read_config(folder)
    _check_shapes(unet, modules_list, folder)
    tensors = load_file(folder / _WEIGHTS_NAME)
    for index, entry in enumerate(modules_list):
        softmax = unet.get_submodule(entry["module_name"])
        linear = LinearAttention.from_attention(softmax, entry["projection_mid_dim"])
        prefix = f"{index}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        linear.load_state_dict(own)
        unet.set_submodule(entry["module_name"], linear)


# The published checkpoints, by the width of the text embedding that tells their families apart.
_PUBLISHED = {
    768: "Yuanshi/LinFusion-1-5",
    1024: "Yuanshi/LinFusion-2-1",
    2048: "Yuanshi/LinFusion-XL",
}


def published_for(cross_attention_dim: int) -> str:
    """The hub id of the published LinFusion modules for a UNet with text embeddings this wide.

    Raises:
        UserError: there are none.
    """
    if cross_attention_dim not in _PUBLISHED:
        raise UserError(
            f"no published LinFusion modules fit a UNet with {cross_attention_dim} wide text "
            "embeddings: name a folder of modules distilled for it, or choose --linfusion none"
        )
    return _PUBLISHED[cross_attention_dim]


def read_config(folder: Path) -> list[dict[str, Any]]:
    """The `modules_list` of a LinFusion checkpoint.

    Raises:
        UserError: `folder` is no LinFusion checkpoint.
    """
    try:
        modules_list: list[dict[str, Any]] = json.loads((folder / "config.json").read_text())[
            "modules_list"
        ]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} is no LinFusion checkpoint (it needs config.json with a modules_list and "
            f"{_WEIGHTS_NAME}): {type(error).__name__}: {error}"
        ) from error
    return modules_list


def _check_shapes(unet: nn.Module, modules_list: list[dict[str, Any]], folder: Path) -> None:
    """Every self-attention is named once, with its own width and head count."""
    wanted = {e["module_name"]: (e["dim_n"], e["heads"]) for e in modules_list}
    found = {n: (a.to_q.in_features, a.heads) for n, a in self_attentions(unet)}
    for name, attention in self_attentions(unet):
        if hasattr(attention.to_q, "base_layer"):
            raise UserError(
                f"{name} has a LoRA, which the LinFusion modules would replace: linearize the "
                "pipeline first and load LoRAs after it"
            )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{folder} does not fit this UNet: {name} is {_shape_text(wanted.get(name))} in "
                f"the checkpoint and {_shape_text(found.get(name))} in the UNet; choose the "
                "LinFusion modules that were distilled from this model family"
            )


def _shape_text(shape: tuple[int, int] | None) -> str:
    return "absent" if shape is None else f"{shape[0]} wide with {shape[1]} heads"
