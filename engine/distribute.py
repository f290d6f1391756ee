"""Make a diffusers pipeline paint in bands, without touching its files.

    full latent [B, C, H, W]  --scatter-->  band [B, C, h, W]     on entering UNet.forward
        every layer runs on the band; those of `engine.bands.layers` ask the other bands
    full latent [B, C, H, W]  <--gather---  band [B, C, h, W]     on leaving it

The pipeline around the UNet (scheduler, guidance, callbacks) sees the whole small latent, the same
on every rank, and needs no change.
"""

from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn

from engine.bands import ExactExchange, Exchange, Mesh, Traffic, banded, split_rows
from engine.bands.layers import BandConv2d, BandDownsample2D, BandGroupNorm, BandSelfAttention
from engine.config import UserError

# Only these very classes are swapped: a subclass may compute something else in its own forward.
_BANDED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: BandConv2d,
    nn.GroupNorm: BandGroupNorm,
    Downsample2D: BandDownsample2D,
}


def distribute(pipe: DiffusionPipeline, mesh: Mesh) -> Exchange | None:
    """Band the UNet and the VAE of `pipe` over `mesh`, in place.

    Afterwards every rank calls `pipe` as ever. The UNet scatters and gathers by itself; the VAE's
    layers are ready for `engine.codec`, which keeps each rank's pixels where they are.

    Returns:
        The exchange, whose `traffic` counts bytes and rounds; None in a world of one rank, where
        the pipeline stays as it is.

    Raises:
        UserError: a self-attention runs a processor that has no exact form over bands.
    """
    if mesh.size == 1:
        return None
    exchange = ExactExchange(mesh, Traffic())
    band_layers(pipe.vae)
    band_unet(pipe.unet, exchange)
    return exchange


def band_layers(network: nn.Module) -> None:
    """Swap the class of each layer that looks beyond its own rows; see `engine.bands.layers`."""
    for name, module in network.named_modules():
        if banded_class := _BANDED_LAYERS.get(type(module)):
            module.__class__ = banded_class
        elif type(module) is Attention and not module.is_cross_attention:
            _require_plain_processor(name, module)
            module.__class__ = BandSelfAttention


def _require_plain_processor(name: str, attention: Attention) -> None:
    processor = type(attention.processor)
    if processor not in (AttnProcessor, AttnProcessor2_0):
        raise UserError(
            f"{name} uses {processor.__name__}, which has no exact form over bands: remove that "
            "attachment, or paint on one rank"
        )


def band_unet(unet: UNet2DConditionModel, exchange: Exchange) -> None:
    """Band the layers of `unet` and put the scatter and the gather into its forward."""
    band_layers(unet)
    _require_short_halos(unet)
    unet.__class__ = _with_boundary(type(unet), exchange)


def downsampling_factor(block_out_channels: list[int]) -> int:
    """How often a diffusers UNet or VAE halves its picture, as a factor: all blocks but the last.

    A UNet's bands begin on multiples of it; a VAE has that many pixels per latent row.
    """
    return int(2 ** (len(block_out_channels) - 1))


def _require_short_halos(unet: nn.Module) -> None:
    """Refuse on every rank alike what a one-row band, the shortest there is, could not serve."""
    for name, module in unet.named_modules():
        if isinstance(module, BandConv2d) and max(module.halo_rows()) > 1:
            raise UserError(
                f"{name} needs a halo of {max(module.halo_rows())} rows, more than the shortest "
                "band may have: only UNets of 3x3 convolutions can be split"
            )


def _with_boundary(base: type[UNet2DConditionModel], exchange: Exchange) -> type:
    """`base` with the scatter and the gather in its forward.

    It keeps the name and module of `base`, which diffusers writes into saved configurations.
    """

    class BandedUNet(base):  # type: ignore[misc]
        traffic_kind = "latent"

        def forward(
            self, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
        ) -> Any:
            multiple = downsampling_factor(self.config.block_out_channels)
            bands = split_rows(sample.shape[-2], exchange.mesh.size, multiple)
            own = bands[exchange.mesh.rank]
            with banded(exchange):
                output = super().forward(
                    sample[:, :, own.start : own.stop], *args, return_dict=True, **kwargs
                )
            lengths = [len(band) for band in bands]
            output.sample = exchange.gather(self, output.sample, 2, lengths)
            return output if return_dict else (output.sample,)

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(BandedUNet, attribute, getattr(base, attribute))
    return BandedUNet
