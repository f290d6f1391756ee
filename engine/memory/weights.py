"""The UNet's weights shared out over the ranks: each holds 1/N, and gathers a block's as it runs.

PyTorch's FSDP2 does it (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv:2304.11277):

    before a block runs    all-gather its weights, 2 to 60 MB in fp16, beside the block before it
    after it has run       free them

so a rank needs its share and two blocks' weights, of SDXL's 6 GB with LinFusion modules; what
travels is all of them, once per forward, whatever the picture's size. All ranks of the job share,
also those that compute another side of guidance: every rank runs the same blocks in the same order.

FSDP2 puts a class of its own in front of each block's, and so does `engine.distribute` in front of
the UNet's; the layers inside of a block keep theirs. So the two live together, provided that
FSDP2's class lies beneath the boundary: `beneath_boundary` sees to that, whichever comes first.
LoRA weights stay whole on every rank: they are small, and `engine.distribute` compares them. LoRAs
may be loaded after, too; a DoRA, which reads the weights that it goes with, only before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from engine.bands import Mesh
from engine.bands.boundary import Boundary, with_boundary, without_boundary
from engine.config import UserError


@contextmanager
def beneath_boundary(network: nn.Module) -> Iterator[None]:
    """Take off what `engine.distribute` has put in front of a network, and put it back after."""
    if not isinstance(network, Boundary):
        yield
        return
    boundary, layout = type(network).__bases__[0], network.layout
    without_boundary(network)
    yield
    with_boundary(network, boundary, layout)


class ShardedUNet:
    """In front of the UNet's class: refuses what needs whole weights."""

    def fuse_lora(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A LoRA is fused before the weights are shared out, or not at all."""
        raise _needs_whole_weights("LoRAs cannot be fused")

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A LoRA fused before stays."""
        raise _needs_whole_weights("LoRAs cannot be unfused")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """No rank has what would be saved."""
        raise _needs_whole_weights("the UNet cannot be saved")


def _needs_whole_weights(what: str) -> UserError:
    return UserError(
        f"{what} while its weights are shared out over the ranks (sharded_weights): do it before "
        "engine.memory.apply(...), or after engine.memory.remove(unet) on every rank"
    )


def require_ranks(mesh: Mesh) -> None:
    """Refuse to share weights out over a single rank, which would save nothing.

    Raises:
        UserError: there is nobody to share with.
    """
    if mesh.group is None:
        raise UserError(
            "sharded_weights shares the UNet's weights out over ranks, and there is one only: "
            "start more, or leave it out"
        )


def shard(unet: nn.Module, mesh: Mesh) -> None:
    """Keep this rank's share of the weights of `unet`, which are the same on every rank.

    Raises:
        UserError: there is nobody to share with.
    """
    require_ranks(mesh)
    assert mesh.group is not None, "several ranks have a group"
    devices = DeviceMesh.from_group(mesh.group, mesh.device.type)
    loras = {weight for name, weight in unet.named_parameters() if "lora_" in name}
    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock2D | BasicTransformerBlock)]
    with torch.inference_mode(False), beneath_boundary(unet):
        base = type(unet)
        attributes = {"__module__": base.__module__, "__doc__": base.__doc__}
        unet.__class__ = type(base.__name__, (ShardedUNet, base), attributes)
        for weight in unet.parameters():  # FSDP2 takes none that lie channels last (engine.fuse)
            weight.data = weight.data.contiguous()
        for block in (*blocks, unet):
            # The UNet's own are freed too: by default FSDP2 keeps the outermost module's.
            fully_shard(block, mesh=devices, reshard_after_forward=True, ignored_params=loras)


def is_sharded(unet: nn.Module) -> bool:
    """Whether `shard` is in force."""
    return isinstance(unet, FSDPModule)


def unshard(unet: nn.Module) -> None:
    """Undo `shard`: whole weights again on every rank, each of which makes this call.

    FSDP2 has no undo of its own, so what it leaves on a module is taken off here piece by piece.
    """
    with torch.inference_mode(False), beneath_boundary(unet):
        blocks = [m for m in unet.modules() if isinstance(m, FSDPModule)]
        for block in blocks:
            block.reshard()  # where a forward broke off
        for module in unet.modules():
            _gather_parameters(module)
            _forget(module)
        for block in blocks:
            _, block.__class__ = type(block).__bases__
            _composable_state._module_state_mapping.pop(block, None)
        _, unet.__class__ = type(unet).__bases__


def _gather_parameters(module: nn.Module) -> None:
    weights: dict[str, Any] = module._parameters
    for name, weight in weights.items():
        if isinstance(weight, DTensor):
            whole = nn.Parameter(weight.full_tensor(), requires_grad=weight.requires_grad)
            weights[name] = whole


def _forget(module: nn.Module) -> None:
    """Remove FSDP2's attributes, and its hooks, told from others' by where they are defined."""
    attributes = vars(module)
    hook_tables = [
        table
        for name, table in attributes.items()
        if name.startswith("_") and name.endswith("_hooks") and isinstance(table, dict)
    ]
    for hooks in hook_tables:
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook).__module__.startswith("torch.distributed.fsdp"):
                del hooks[key]
    for name in [n for n in attributes if n.startswith("__composable_api") or "_fsdp_" in n]:
        del attributes[name]
