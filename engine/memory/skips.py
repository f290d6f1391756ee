"""The UNet's skip tensors: waiting on the host, and joined to the hidden states at the last moment.

On its way down the UNet keeps the output of every residual block, on its way up it takes them back
in reverse. At 16384 px those of SDXL are 13 GB in fp16, of which the first ones, each 2.7 GB, wait
the longest. With `skips_on_host` they leave the GPU as soon as the next layer has them:

    conv_in, down blocks     -> (sample, skips), each skip a `HostSkip`: copied to the host while
                                the next layers compute, its memory on the GPU free after that
    up blocks                <- each skip comes back when its residual block is about to run

diffusers' UNet passes skips on without looking into them, but for `.shape`, and for `+` where a
ControlNet adds its residuals; a `HostSkip` answers both, and adds when it comes back. A T2I-Adapter
adds in place to the last output of a block: so that one leaves when the next block begins.

Back on the GPU, a skip is not copied into one tensor with the hidden states where the residual
block (`engine.bands.chunks`) takes the two as they are.
"""

from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UpBlock2D,
)
from diffusers.utils import torch_utils
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.bands.chunks import ChunkedResnetBlock2D
from engine.config import UserError
from engine.kernels.layout import layout_of


def require_device(device: torch.device) -> None:
    """Refuse to move tensors from the host to the host, which would save nothing.

    Raises:
        UserError: `device` is the host.
    """
    if device.type == "cpu":
        raise UserError(
            "skips_on_host frees a GPU's memory, and this UNet computes on the CPU: leave it out, "
            "or paint on a GPU"
        )


class HostSkip:
    """A skip tensor that is on its device until `leave`, then on the host until `fetch`."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.device = tensor.shape, tensor.device
        self._tensor = tensor
        self._added: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def __add__(self, residual: Tensor) -> "HostSkip":
        """A ControlNet's residual; added to the tensor when it is fetched."""
        self._added.append(residual)
        return self

    @property
    def held(self) -> Tensor:
        """The tensor, which has not left its device yet."""
        assert self._tensor.device == self.device
        return self._tensor

    def leave(self, stream: torch.cuda.Stream | None) -> None:
        """Copy it to the host, on `stream`, beside what the device goes on computing."""
        if stream is None:
            self._tensor = self._tensor.to("cpu", copy=True)
            return
        layout = layout_of(self._tensor)  # another one would be made on the device first
        host = torch.empty(
            self.shape, dtype=self._tensor.dtype, pin_memory=True, memory_format=layout
        )
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            host.copy_(self._tensor, non_blocking=True)
            self._copied = stream.record_event()
        self._tensor.record_stream(stream)  # its memory is not reused before it is copied
        self._tensor = host

    def fetch(self) -> Tensor:
        """The tensor on its device, with all that was added. It can be fetched once."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
        tensor = self._tensor.to(self.device, non_blocking=True)
        del self._tensor
        for residual in self._added:
            tensor = tensor + residual
        return tensor


class HostSkips:
    """All of one forward's, made by `conv_in` and the down blocks."""

    def __init__(self) -> None:
        self._last: HostSkip | None = None
        self._stream: torch.cuda.Stream | None = None
        self._hook: RemovableHandle | None = None

    def start(self, unet: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins: also the output of `conv_in`, or of a LoRA around it, is a skip.

        Raises:
            UserError: the UNet computes on the host already.
        """
        self.finish()
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        require_device(sample.device)
        self._hook = unet.conv_in.register_forward_hook(lambda conv, _, y: self.hold(y))

    def finish(self, *hook_arguments: Any) -> None:
        """A forward ends, or has ended by an error."""
        if self._hook is not None:
            self._hook.remove()
        self._last, self._stream, self._hook = None, None, None

    def hold(self, tensor: Tensor) -> HostSkip:
        """A skip that the next block begins with, and which may still be added to until then."""
        self.send_last()
        self._last = HostSkip(tensor)
        return self._last

    def send_last(self) -> None:
        """Let what was held last leave."""
        if self._last is not None:
            if self._stream is None and self._last.device.type == "cuda":
                self._stream = torch.cuda.Stream(self._last.device)
            self._last.leave(self._stream)
            self._last = None


class _HostDown(nn.Module):
    """A down block whose outputs leave for the host, each when the next one is there."""

    skips: HostSkips

    def forward(
        self, hidden_states: Tensor | HostSkip, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, tuple[HostSkip, ...]]:
        """[B, C, h, W] -> (the last output, all outputs as `HostSkip`s)"""
        sample = hidden_states.held if isinstance(hidden_states, HostSkip) else hidden_states
        self.skips.send_last()
        sample, outputs = super().forward(sample, *args, **kwargs)
        return sample, tuple(self.skips.hold(output) for output in outputs)


class HostDownBlock2D(_HostDown, DownBlock2D):  # type: ignore[misc]
    """Without attention: SDXL's first block, SD-1.5's last."""


class HostCrossAttnDownBlock2D(_HostDown, CrossAttnDownBlock2D):  # type: ignore[misc]
    """With attention."""


class Handover:
    """What an up block leaves to the next one, which takes it.

    Diffusers' UNet keeps an up block's input until the block has run, in a variable of its own; of
    the largest one, 5 GB at 16384 px, only the first residual block has need. So that variable gets
    this instead.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        """The tensor, which this object then no longer holds."""
        tensor, self._tensor = self._tensor, None
        assert tensor is not None, "taken already"
        return tensor


class _LateJoin(nn.Module):
    """An up block that fetches each skip when it is needed, and leaves joining to the resnet.

    Attributes:
        hands_over: whether another up block comes after this one.
    """

    hands_over: bool
    resnets: nn.ModuleList
    upsamplers: nn.ModuleList | None
    resolution_idx: int

    def forward(
        self,
        hidden_states: Tensor | Handover,
        res_hidden_states_tuple: tuple[Tensor | HostSkip, ...],
        temb: Tensor | None = None,
        *,
        upsample_size: tuple[int, int] | None = None,
        **attention_options: Any,
    ) -> Tensor | Handover:
        """[B, C, h, W] and the skips, the one to be used first at the end -> [B, C', 2h, 2W]"""
        hidden = _taken(hidden_states)
        del hidden_states
        waiting = list(res_hidden_states_tuple)
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        for resnet, attention in zip(self.resnets, attentions, strict=True):
            hidden = self._run_resnet(resnet, hidden, waiting.pop(), temb)
            if attention is not None:
                (hidden,) = attention(hidden, **attention_options, return_dict=False)
        for upsampler in self.upsamplers or ():
            hidden = upsampler(hidden, upsample_size)
        return Handover(hidden) if self.hands_over else hidden

    def _run_resnet(
        self, resnet: nn.Module, hidden: Tensor, waiting: Tensor | HostSkip, temb: Tensor | None
    ) -> Tensor:
        skip = waiting.fetch() if isinstance(waiting, HostSkip) else waiting
        hidden, skip = self._filter(hidden, skip)
        if isinstance(resnet, ChunkedResnetBlock2D):
            return resnet(hidden, temb, skip=skip)
        return resnet(torch.cat([hidden, skip], dim=1), temb)

    def _filter(self, hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """FreeU (arXiv:2309.11497), where it is switched on."""
        factors = {name: getattr(self, name, None) for name in ("s1", "s2", "b1", "b2")}
        if not all(factors.values()):
            return hidden, skip
        return torch_utils.apply_freeu(self.resolution_idx, hidden, skip, **factors)


def _taken(given: Tensor | Handover) -> Tensor:
    return given.take() if isinstance(given, Handover) else given


class LateJoinUpBlock2D(_LateJoin, UpBlock2D):  # type: ignore[misc]
    """Without attention: SDXL's last block, SD-1.5's first."""


class LateJoinCrossAttnUpBlock2D(_LateJoin, CrossAttnUpBlock2D):  # type: ignore[misc]
    """With attention."""
