"""Make a diffusers pipeline paint in bands: `distribute(pipe)`, and `collect(pipe)` to undo it.

    pipe = StableDiffusionXLPipeline.from_pretrained(...)
    engine.linearize(pipe)                   # LinFusion's linear attention (optional)
    engine.distribute(pipe)                  # on every rank, under torchrun
    image = pipe("a lake at dawn").images[0] # as ever; every rank gets the whole picture

Nothing is copied or wrapped. The layers that look beyond their own rows change their class
(`engine.bands.layers`), and so do UNet, ControlNets and VAE, whose new classes scatter and gather
(`engine.bands.boundary`), and the pipeline, whose new class lets no random number differ between
ranks. The pipeline in between (scheduler, guidance, callbacks) sees whole latents.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from engine.bands import ExactExchange, Exchange, Mesh, Traffic, functions, join_mesh
from engine.bands.boundary import (
    Boundary,
    ControlNetBoundary,
    Layout,
    UNetBoundary,
    VAEBoundary,
    digest,
    require_no_drift,
    with_boundary,
    without_boundary,
)
from engine.bands.layers import (
    BandConv2d,
    BandDownsample2D,
    BandGroupNorm,
    BandSelfAttention,
    BandUpsample2D,
    FusedGroupNorm,
    require_plain_processor,
)
from engine.bands.resnet import BandResnetBlock2D, is_usual
from engine.config import UserError

# Only these very classes are swapped: a subclass may compute something else in its own forward.
_BANDED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: BandConv2d,
    nn.GroupNorm: BandGroupNorm,
    Downsample2D: BandDownsample2D,
    ResnetBlock2D: BandResnetBlock2D,
    Upsample2D: BandUpsample2D,
}
# The blocks of Stable Diffusion, whose every operation is known; others pool, say, or resize.
# `engine.memory` puts subclasses in their places, which compute the same.
_BLOCKS = (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
_PLAIN_LAYERS = {banded: plain for plain, banded in _BANDED_LAYERS.items()} | {
    BandSelfAttention: Attention
}


def distribute(
    pipe: DiffusionPipeline,
    mesh: Mesh | None = None,
    *,
    groups: int = 1,
    exchange: Callable[[Mesh, Traffic], Exchange] = ExactExchange,
    check_drift: bool = True,
) -> Layout:
    """Band the UNet, the ControlNets and the VAE of `pipe` over all ranks, in place.

    Every rank makes this call, and then every call of `pipe`, alike. Calling it again distributes
    anew, for a pipeline that has got another ControlNet, say.

    Args:
        mesh: the ranks; by default those that torchrun started, the pipeline moving to this rank's
            GPU where every rank has one.
        groups: into how many groups of ranks the batch (guidance and pictures) is shared out;
            each group cuts the picture into bands.
        exchange: the synchronisation mode of the UNet, made of a mesh and its traffic: a class, or
            `partial(DisplacedExchange, warmup_steps=2)`. The VAE's is always exact.
        check_drift: compare latents and prompts of all ranks at each step, a round of 16 bytes.

    Returns:
        How the UNet is laid out; its `traffic` counts bytes and rounds.

    Raises:
        UserError: the pipeline has something that has no exact form over bands, or hooks that
            would bypass the bands.
    """
    mesh = mesh or join_mesh().on_device("auto")
    require_same_versions(mesh)
    collect(pipe)
    mesh.agree(lambda: _refuse(pipe))
    with torch.inference_mode(False):  # sharded weights (`engine.memory`) would not move under it
        pipe.to(mesh.device)
    layout = share_out(mesh, groups, exchange, check_drift)
    if mesh.size > 1:
        vae_layout = share_out(mesh, 1, ExactExchange, check_drift, layout.traffic)
        mesh.agree(lambda: _swap_classes(pipe, layout, vae_layout))
    else:
        for network, _ in _networks(pipe):
            fold_upsampling(network)
    return layout


def lay_out(pipe: DiffusionPipeline, layout: Layout) -> None:
    """Give the UNet and the ControlNets of a distributed pipeline another layout, for a call."""
    for network, boundary in _networks(pipe):
        if isinstance(network, Boundary) and boundary is not VAEBoundary:
            type(network).layout = layout
    if isinstance(pipe, Boundary):
        type(pipe).layout = layout


def _swap_classes(pipe: DiffusionPipeline, layout: Layout, vae_layout: Layout) -> None:
    functions.install()
    for network, boundary in _networks(pipe):
        band_layers(network)
        _require_plain_convolutions(network)
        with_boundary(network, boundary, vae_layout if boundary is VAEBoundary else layout)
    with_boundary(pipe, PipelineBoundary, layout)


def share_out(
    mesh: Mesh,
    groups: int,
    exchange: Callable[[Mesh, Traffic], Exchange] = ExactExchange,
    check_drift: bool = True,
    traffic: Traffic | None = None,
) -> Layout:
    """The layout of `mesh` with the batch shared out over `groups`, each of which cuts bands.

    Every rank makes the call alike. `traffic` goes on counting where it is given.
    """
    traffic = traffic or Traffic()
    batch, bands = mesh.split(groups)
    return Layout(
        mesh, batch, exchange(bands, traffic) if bands.size > 1 else None, traffic, check_drift
    )


def collect(pipe: DiffusionPipeline) -> None:
    """Undo `distribute`: `pipe` computes on this rank alone again, by whichever kernels it did."""
    if isinstance(pipe, PipelineBoundary):
        pipe.layout.close()
    without_boundary(pipe)
    for network, _ in _networks(pipe):
        layers = dict(_PLAIN_LAYERS) if isinstance(network, Boundary) else {}
        layers[BandUpsample2D] = Upsample2D
        if any(isinstance(module, FusedGroupNorm) for module in network.modules()):
            layers.pop(BandConv2d, None)  # `engine.fuse` has them everywhere
        without_boundary(network)
        for module in network.modules():
            if plain := layers.get(type(module)):
                module.__class__ = plain


def _networks(pipe: DiffusionPipeline) -> Iterator[tuple[nn.Module, type[Boundary]]]:
    """The networks that work on rows of the picture. All others run whole on every rank."""
    if isinstance(getattr(pipe, "unet", None), UNet2DConditionModel):
        yield pipe.unet, UNetBoundary
    controlnets = getattr(pipe, "controlnet", None)
    for controlnet in getattr(controlnets, "nets", [controlnets]):
        if isinstance(controlnet, ControlNetModel | ControlNetUnionModel):
            yield controlnet, ControlNetBoundary
    if isinstance(getattr(pipe, "vae", None), AutoencoderKL):
        yield pipe.vae, VAEBoundary


def band_layers(network: nn.Module) -> None:
    """Swap the class of each layer that looks beyond its own rows; see `engine.bands.layers`."""
    _require_plain_processors(network)
    for module in network.modules():
        if type(module) is ResnetBlock2D and not is_usual(module):
            continue  # its norms and convolutions are banded, one by one
        if banded_class := _BANDED_LAYERS.get(type(module)):
            module.__class__ = banded_class
        elif type(module) is Attention and not module.is_cross_attention:
            module.__class__ = BandSelfAttention


def fold_upsampling(network: nn.Module) -> None:
    """For one rank: let `network` double its pictures by phases, as `band_layers` does too."""
    for module in network.modules():
        if type(module) is Upsample2D:
            module.__class__ = BandUpsample2D


def _require_plain_convolutions(network: nn.Module) -> None:
    """Refuse on every rank alike what bands do not do: wrap around, or mirror, at the edges."""
    for name, module in network.named_modules():
        if isinstance(module, BandConv2d) and module.padding_mode != "zeros":
            raise UserError(
                f"{name} pads with {module.padding_mode!r}, which bands do not: set padding_mode "
                "to 'zeros', or paint on one rank"
            )


def _require_plain_processors(network: nn.Module) -> None:
    """No processor is asked over bands, so one that does something else would be ignored."""
    for name, module in network.named_modules():
        if isinstance(module, Attention) and not module.is_cross_attention:
            require_plain_processor(name, module)


def require_same_versions(mesh: Mesh) -> None:
    """Ranks with other libraries would compute something else, or wait for what never comes."""
    versions = mesh.gather_objects(f"torch {torch.__version__}, diffusers {diffusers.__version__}")
    for rank, version in enumerate(versions):
        if version != versions[0]:
            raise UserError(
                f"rank {rank} runs {version}, but rank 0 runs {versions[0]}: install the same "
                "versions everywhere"
            )


def _refuse(pipe: DiffusionPipeline) -> None:
    """What cannot be exact is refused by name, before the first step."""
    name = type(pipe).__name__
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(f"{name} has no UNet2DConditionModel: only Stable Diffusion is distributed")
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    blocks = [block for block in blocks if block is not None]
    if unknown := {type(b).__name__ for b in blocks if not isinstance(b, _BLOCKS)}:
        raise UserError(
            f"{name} has a UNet of {', '.join(sorted(unknown))}, with no exact form over bands: "
            "only Stable Diffusion is distributed"
        )
    if hasattr(pipe, "set_pag_applied_layers"):
        raise UserError(
            f"{name} perturbs self-attention (PAG), which has no exact form over bands: use the "
            "pipeline without PAG, or paint on one rank"
        )
    if getattr(unet, "position_net", None) is not None:
        raise UserError(
            f"{name} attends to grounding boxes (GLIGEN), which has no exact form over bands: use "
            "a UNet without them, or paint on one rank"
        )
    _refuse_hooks(pipe)


def _refuse_hooks(pipe: DiffusionPipeline) -> None:
    """Hooks of accelerate and diffusers keep the `forward` of the class that a layer had."""
    for part, network in pipe.components.items():
        modules = network.modules() if isinstance(network, nn.Module) else ()
        if any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in modules):
            raise UserError(
                f"{part} has offload hooks, which would bypass the bands: call "
                "engine.distribute(pipe) first and enable offloading after it"
            )


class PipelineBoundary(Boundary):
    """In front of a pipeline's class: all ranks draw the same noise, whatever they were given."""

    unet: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own, on every rank alike."""
        call, world = super().__call__, self.layout.world  # type: ignore[misc]
        given = world.agree(lambda: inspect.signature(call).bind(*args, **kwargs).arguments)
        with self.painting(given):
            _share_random_state(world, given.get("generator"))
            return call(*args, **kwargs)

    @contextmanager
    def painting(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Around all that makes one picture of what was `given`, on every rank alike.

        Raises:
            UserError: ranks were given different things, or something has no exact form over bands.
        """
        self.layout.world.agree(self._refuse_attachments)
        _require_same_call(self.layout.world, given, self.unet)
        self.forget()
        yield
        self.forget()  # nothing is left on its way, and no buffers are held

    def forget(self) -> None:
        """Another picture begins, or another rung of one; for modes that remember."""
        if self.layout.exchange is not None:
            self.layout.exchange.reset()

    def _refuse_attachments(self) -> None:
        """What was attached after `distribute` is refused before the first step too."""
        for network, _ in _networks(self):
            _require_plain_processors(network)
            _require_plain_convolutions(network)
            if isinstance(network, VAEBoundary):
                network.refuse_tiling()

    def prepare_image(self, *args: Any, **kwargs: Any) -> Any:
        """A ControlNet's condition picture, kept on the host, where each rank takes its rows."""
        return self._alike(super().prepare_image(*args, **_on_host(kwargs)))  # type: ignore[misc]

    def prepare_control_image(self, *args: Any, **kwargs: Any) -> Any:
        """The same under the name that it has in image-to-image pipelines."""
        picture = super().prepare_control_image(*args, **_on_host(kwargs))  # type: ignore[misc]
        return self._alike(picture)

    def _alike(self, picture: Tensor) -> Tensor:
        """Condition pictures reach the UNet in pieces, so they are compared here, once a call."""
        if self.layout.check_drift:
            require_no_drift(self.layout.world, [picture], self.layout.world.device)
        return picture


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs


def _require_same_call(mesh: Mesh, given: Mapping[str, Any], unet: nn.Module) -> None:
    """Ranks that were told different things would paint a chimera, or wait for each other."""
    plain = {name: value for name, value in given.items() if _is_plain(value)}
    plain["set of LoRAs"] = _loras(unet)
    for rank, theirs in enumerate(calls := mesh.gather_objects(plain)):
        for name in sorted(theirs.keys() | calls[0].keys()):
            if theirs.get(name) != calls[0].get(name):
                raise UserError(
                    f"rank {rank} was given another {name} than rank 0: make the same call on "
                    "every rank"
                )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def _loras(unet: nn.Module) -> list[Any]:
    """What tells the LoRAs of a network: their layers, names, scales and a digest of weights."""
    return [
        (
            name,
            module.active_adapters,
            dict(module.scaling),
            digest(module.lora_B.parameters(), torch.device("cpu")).tolist(),
        )
        for name, module in unet.named_modules()
        if hasattr(module, "lora_B") and hasattr(module, "scaling")
    ]


def _share_random_state(mesh: Mesh, generators: Any) -> None:
    """Give every rank rank 0's random state: of torch itself, and of the generators passed."""
    listed = generators if isinstance(generators, list | tuple) else [generators]
    own = [generator for generator in listed if generator is not None]
    states = [torch.get_rng_state(), *(generator.get_state() for generator in own)]
    if mesh.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(mesh.device))
    gathered = mesh.gather_objects((len(own), states if mesh.rank == 0 else []))
    wanted, first = gathered[0]
    for rank, (count, _) in enumerate(gathered):
        if count != wanted:
            raise UserError(
                f"rank {rank} was given {count} generators, rank 0 {wanted}: make the same call on "
                "every rank"
            )
    if mesh.device.type == "cuda":
        torch.cuda.set_rng_state(first.pop(), mesh.device)
    torch.set_rng_state(first[0])
    for generator, state in zip(own, first[1:], strict=True):
        generator.set_state(state)
