"""A UNet that needs less memory: settings that trade a little time for it, and change no result.

    from engine import memory

    memory.apply(pipe.unet, memory.MemoryOptions(token_chunks=16, row_chunks=16))
    memory.remove(pipe.unet)

What a UNet holds at 16384 x 16384 px, SDXL with linear attention in fp16: 6 GB of weights, 13 GB of
skip tensors that wait for their turn, and up to 28 GB more inside of one feed-forward. Each setting
takes away one of these, and all may be combined, on one rank or with `engine.distribute`, which may
come before or after:

    token_chunks         transformers work through their tokens in that many chunks, over their
                         own input (transformer.py)
    row_chunks           residual blocks and up-sampling work through their rows in that many
                         chunks, and no convolution takes or makes 2^31 elements or more at once,
                         where 32-bit indices end (engine.bands.chunks)
    inplace_activations  without chunks, activations and sums overwrite what they are made of
    skips_on_host        skip tensors wait in the host's memory (skips.py)
    sharded_weights      every rank keeps 1/N of the weights (weights.py)

As in `engine.parallel`, nothing is wrapped: layers change their class in place, names and weights
stay, and a LoRA may come before or after. All are for inference: activations that gradients would
need are overwritten.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.bands import Mesh, join_mesh
from engine.bands.boundary import Boundary
from engine.bands.chunks import (
    ChunkedResnetBlock2D,
    ChunkedUpsample2D,
    InplaceResnetBlock2D,
)
from engine.bands.layers import BandConv2d, BandUpsample2D, FusedGroupNorm, plain_convolution
from engine.bands.resnet import BandResnetBlock2D, FusedResnetBlock2D
from engine.config import UserError
from engine.kernels.layout import TokensTransformer2D
from engine.kernels.pointwise import FusedGEGLU
from engine.memory.skips import (
    HostCrossAttnDownBlock2D,
    HostDownBlock2D,
    HostSkips,
    LateJoinCrossAttnUpBlock2D,
    LateJoinUpBlock2D,
    require_device,
)
from engine.memory.transformer import (
    ChunkedTransformer2D,
    ChunkedTransformerBlock,
    FusedInplaceGEGLU,
    InplaceGEGLU,
)
from engine.memory.weights import is_sharded, require_ranks, shard, unshard


@dataclass(frozen=True)
class MemoryOptions:
    """What to save memory by; None and False leave the UNet as it is.

    Attributes:
        token_chunks: chunks of the tokens in each transformer; 8 to 32 are usual.
        row_chunks: chunks of the rows in each residual block and up-sampling; 8 to 32 are usual.
        inplace_activations: what `token_chunks=1` and an unchunked residual block can save.
        skips_on_host: needs a GPU.
        sharded_weights: needs several ranks.
    """

    token_chunks: int | None = None
    row_chunks: int | None = None
    inplace_activations: bool = False
    skips_on_host: bool = False
    sharded_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("token_chunks", "row_chunks"):
            chunks = getattr(self, name)
            if chunks is not None and chunks < 1:
                raise UserError(f"{name} is {chunks}: it must be 1 or more, or None for no chunks")


def require(options: MemoryOptions, mesh: Mesh) -> None:
    """What `options` need, known before there is a UNet.

    Raises:
        UserError: `mesh` has one rank only, or computes on the host, and an option needs more.
    """
    if options.sharded_weights:
        require_ranks(mesh)
    if options.skips_on_host:
        require_device(mesh.device)


def apply(unet: UNet2DConditionModel, options: MemoryOptions, mesh: Mesh | None = None) -> None:
    """Let `unet` save memory as `options` say, in place, instead of what was applied before.

    Args:
        mesh: the ranks that share the weights out, each of which makes this call; by default those
            that torchrun started.

    Raises:
        UserError: the UNet has hooks that would bypass the changed layers, or an option needs more
            ranks than there are.
    """
    remove(unet)
    if options == MemoryOptions():
        return
    swaps = _swaps(options)
    _refuse(unet, swaps)
    for module in unet.modules():
        if type(module) in swaps and _is_usual(module):
            module.__dict__["class_before"] = type(module)
            module.__class__ = swaps[type(module)]
            _set_chunks(module, options)
    for block in unet.up_blocks:
        if isinstance(block, LateJoinUpBlock2D | LateJoinCrossAttnUpBlock2D):
            block.hands_over = block is not unet.up_blocks[-1]
    unet._memory_handles = [unet.register_forward_pre_hook(_require_inference)]
    if options.skips_on_host:
        unet._memory_handles += _send_skips(unet)
    if options.sharded_weights:
        shard(unet, mesh or join_mesh().on_device("auto"))


def remove(unet: UNet2DConditionModel) -> None:
    """Undo `apply`. With sharded weights every rank makes this call."""
    if is_sharded(unet):
        unshard(unet)
    for hook in unet.__dict__.pop("_memory_handles", ()):
        hook.remove()
    fused = any(isinstance(module, FusedGroupNorm) for module in unet.modules())
    for module in unet.modules():
        before = module.__dict__.pop("class_before", None)
        if before is not None:
            usual = _BANDED if isinstance(unet, Boundary) else _NOT_BANDED
            module.__class__ = usual.get(before, before)
            for name in ("token_chunks", "row_chunks", "skips", "hands_over"):
                module.__dict__.pop(name, None)
        elif type(module) is BandConv2d and not (fused or isinstance(unet, Boundary)):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # of a LoRA that came since


def moves(unet: UNet2DConditionModel) -> bool:
    """Whether weights or skip tensors come and go during a forward."""
    hosts = (HostDownBlock2D, HostCrossAttnDownBlock2D)
    return is_sharded(unet) or any(isinstance(block, hosts) for block in unet.down_blocks)


Swaps = dict[type[nn.Module], type[nn.Module]]

_TRANSFORMER: Swaps = {
    BasicTransformerBlock: ChunkedTransformerBlock,
    GEGLU: InplaceGEGLU,
    FusedGEGLU: FusedInplaceGEGLU,
}
_TOKENS: Swaps = {
    **_TRANSFORMER,
    Transformer2DModel: ChunkedTransformer2D,
    TokensTransformer2D: ChunkedTransformer2D,
}
_LATE_JOIN: Swaps = {
    UpBlock2D: LateJoinUpBlock2D,
    CrossAttnUpBlock2D: LateJoinCrossAttnUpBlock2D,
}
_HOST_DOWN: Swaps = {
    DownBlock2D: HostDownBlock2D,
    CrossAttnDownBlock2D: HostCrossAttnDownBlock2D,
}
_ROWS: Swaps = {
    ResnetBlock2D: ChunkedResnetBlock2D,
    BandResnetBlock2D: ChunkedResnetBlock2D,
    FusedResnetBlock2D: ChunkedResnetBlock2D,
    Upsample2D: ChunkedUpsample2D,
    BandUpsample2D: ChunkedUpsample2D,
    nn.Conv2d: BandConv2d,  # of the other convolutions, too, none is given 2^31 elements
}
_IN_PLACE: Swaps = {
    ResnetBlock2D: InplaceResnetBlock2D,
    BandResnetBlock2D: InplaceResnetBlock2D,
    FusedResnetBlock2D: InplaceResnetBlock2D,
}
# What a layer becomes again, where the UNet was distributed, or collected, in between.
_BANDED: Swaps = {
    ResnetBlock2D: BandResnetBlock2D,
    Upsample2D: BandUpsample2D,
    nn.Conv2d: BandConv2d,
}
_NOT_BANDED: Swaps = {BandResnetBlock2D: ResnetBlock2D}


def _swaps(options: MemoryOptions) -> Swaps:
    """Which class becomes which."""
    swaps: Swaps = {}
    if options.inplace_activations:
        swaps |= _TRANSFORMER | _IN_PLACE
    if options.token_chunks is not None:
        swaps |= _TOKENS
    if options.row_chunks is not None:
        swaps |= _ROWS | _LATE_JOIN
    if options.skips_on_host:
        swaps |= _HOST_DOWN | _LATE_JOIN
    return swaps


def _set_chunks(module: nn.Module, options: MemoryOptions) -> None:
    if isinstance(module, ChunkedResnetBlock2D | ChunkedUpsample2D):
        assert options.row_chunks is not None
        module.row_chunks = options.row_chunks
    if isinstance(module, ChunkedTransformerBlock | ChunkedTransformer2D):
        module.token_chunks = options.token_chunks or 1


def _send_skips(unet: UNet2DConditionModel) -> list[RemovableHandle]:
    """One `HostSkips` for all down blocks, told where a forward begins and ends."""
    skips = HostSkips()
    for block in unet.down_blocks:
        if isinstance(block, HostDownBlock2D | HostCrossAttnDownBlock2D):
            block.skips = skips
    return [
        unet.register_forward_pre_hook(skips.start, with_kwargs=True),
        unet.register_forward_hook(skips.finish, always_call=True),
    ]


def _is_usual(module: nn.Module) -> bool:
    """Whether a layer is as Stable Diffusion has it; others keep their class."""
    if isinstance(module, ResnetBlock2D):
        return (
            module.upsample is module.downsample is None
            and module.time_embedding_norm == "default"
            and module.time_emb_proj is not None
            and isinstance(module.nonlinearity, nn.SiLU)
            and plain_convolution(module.conv2).out_channels == module.out_channels
        )
    if isinstance(module, Upsample2D):
        return bool(module.use_conv and module.interpolate) and module.norm is None
    if isinstance(module, BasicTransformerBlock):
        plain = module.norm_type == "layer_norm" and module.pos_embed is None
        return plain and not (module.only_cross_attention or module.double_self_attention)
    if isinstance(module, Transformer2DModel):
        return bool(module.is_input_continuous)
    return True


def _refuse(unet: UNet2DConditionModel, swaps: Swaps) -> None:
    """Offload hooks keep the `forward` of the class that a layer had, or its weights elsewhere."""
    for name, module in unet.named_modules():
        if name and (hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")):
            raise UserError(
                f"{name} has an offload hook of its own, which would bypass settings that save "
                "memory: leave sequential and group offloading out, sharded_weights does their work"
            )
    if swaps and getattr(unet, "position_net", None) is not None:
        raise UserError(
            "this UNet attends to grounding boxes (GLIGEN), which the settings that save memory do "
            "not: use a UNet without them, or leave the settings out"
        )


def _require_inference(unet: UNet2DConditionModel, args: Any) -> None:
    needs_gradients = torch.is_grad_enabled() and any(p.requires_grad for p in unet.parameters())
    if needs_gradients or unet.training:
        raise UserError(
            "settings that save memory overwrite what training needs: call the UNet in eval mode "
            "and under torch.no_grad(), or remove them"
        )
