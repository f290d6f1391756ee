"""Which kernels a network computes by: PyTorch's, or this house's for GPUs.

    choose_kernels(pipe.unet, "fused")       and the VAE; "plain" undoes it

As everywhere, nothing is wrapped: layers change their class in place, names, weights and what is
saved stay as they are. What "fused" changes, and where:

    pictures             lie channels last, as tensor cores want them, and as tokens are anyway
    group norms          with SiLU in one pass, their sums in another (engine.kernels.norms)
    residual blocks      add biases and the time's shift where others read and write anyway
    doubled pictures     are put together from their phases, with the bias, in one pass
    layer norms          one pass (engine.kernels.norms)
    linear attention     state and application in a pass each (engine.kernels.fused)
    feed-forwards        gate in one pass (engine.kernels.pointwise)

The results are those of the plain layers up to rounding.
"""

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from engine.bands.boundary import Boundary
from engine.bands.layers import BandConv2d, BandGroupNorm, FusedGroupNorm
from engine.bands.resnet import BandResnetBlock2D, FusedResnetBlock2D, is_usual
from engine.config import UserError
from engine.kernels import fused
from engine.kernels.layout import TokensTransformer2D
from engine.kernels.norms import FusedLayerNorm
from engine.kernels.pointwise import FusedGEGLU
from engine.linfusion import FusedLinearAttention, LinearAttention

Swaps = dict[type[nn.Module], type[nn.Module]]

_FUSED: Swaps = {
    LinearAttention: FusedLinearAttention,
    GEGLU: FusedGEGLU,
    nn.Conv2d: BandConv2d,  # none is given 2^31 elements
    nn.GroupNorm: FusedGroupNorm,
    BandGroupNorm: FusedGroupNorm,
    nn.LayerNorm: FusedLayerNorm,
    ResnetBlock2D: FusedResnetBlock2D,
    BandResnetBlock2D: FusedResnetBlock2D,
    Transformer2DModel: TokensTransformer2D,
}
# What a layer becomes again, where the network is distributed and where it is not.
_BANDED: Swaps = {FusedGroupNorm: BandGroupNorm, FusedResnetBlock2D: BandResnetBlock2D}
_ALONE: Swaps = {
    BandConv2d: nn.Conv2d,
    FusedGroupNorm: nn.GroupNorm,
    FusedResnetBlock2D: ResnetBlock2D,
}
_PLAIN: Swaps = {
    FusedLinearAttention: LinearAttention,
    FusedGEGLU: GEGLU,
    FusedLayerNorm: nn.LayerNorm,
    TokensTransformer2D: Transformer2DModel,
}


def choose_kernels(network: nn.Module, kernels: str) -> None:
    """Let a UNet or a VAE compute by "plain" or by "fused" kernels, in place.

    Before or after `engine.distribute`, before `engine.memory.apply`, and alike on every rank: what
    fused residual blocks send to their neighbours is without biases.

    Raises:
        UserError: there are no such kernels, or settings that save memory have changed the layers.
    """
    if kernels not in ("plain", "fused"):
        raise UserError(f"there are no kernels {kernels!r}: choose plain or fused")
    if "_memory_handles" in vars(network):
        raise UserError(
            "settings that save memory have been applied to this UNet: choose its kernels before "
            "them, or call engine.memory.remove first"
        )
    changed = False
    undone = _PLAIN | (_BANDED if isinstance(network, Boundary) else _ALONE)
    swaps = _FUSED if kernels == "fused" else undone
    for module in network.modules():
        if type(module) is ResnetBlock2D and not is_usual(module):
            continue  # its layers are fused, one by one
        if isinstance(module, Upsample2D):
            module.fused = kernels == "fused"  # whatever class it is of
        if swapped := swaps.get(type(module)):
            module.__class__, changed = swapped, True
    layout = torch.channels_last if kernels == "fused" else torch.contiguous_format
    for weight in network.parameters() if changed else ():  # else they lie as the user likes
        if weight.ndim == 4:
            with torch.inference_mode(weight.is_inference()):  # of the same kind as before
                weight.data = weight.data.contiguous(memory_format=layout)


def kernels_for(kernels: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `kernels` comes to where it is "auto": "fused" on a GPU that runs them."""
    if kernels != "auto":
        return kernels
    can = device.type == "cuda" and dtype in fused.DTYPES and fused.runs(device)
    return "fused" if can else "plain"


def require_kernels(kernels: str, device: torch.device) -> None:
    """Refuse kernels that `device` does not run.

    Raises:
        UserError: it is no GPU, or too old a one, or Triton is not installed.
    """
    if kernels != "fused" or fused.is_available(device):
        return
    if device.type == "cpu":
        raise UserError(
            "kernels fused are for GPUs, and this job computes on the CPU: leave kernels out, or "
            "paint on a GPU"
        )
    if fused.is_installed():
        raise UserError(
            "kernels fused are for GPUs from Ampere on, and this one is older: leave kernels out"
        )
    raise UserError(
        "kernels fused are written in Triton, which is not installed: install the triton that "
        "your torch names (torch for CUDA brings it), or leave kernels out"
    )
