"""CUDA graphs around a UNet: a forward's thousands of launches, recorded once and replayed by one.

    with replayed(pipe.unet):
        ...                          calls of the UNet, as ever

A forward of SD-1.5 launches some 1000 kernels, one of SDXL 3000 and more, and a host takes longer
to launch them than a GPU to run them wherever a picture is small: on an H200 with a slow host SDXL
took 189 ms a step at 1024x512 px, and 35 ms recorded.

The first two calls with arguments of some shapes are ordinary ones, by which libraries choose their
kernels and kernels are compiled (two, since guidance in turn asks for both of its sides before a
dilated network is asked for the first time, which had better not find memory taken); the third is
recorded, and it and all that follow are replayed: arguments are copied to where the recording reads
them, and the result from where it writes. It is the same to the bit. Another shape, another
dilation, another exchange is another recording; all of them share their memory, which is given back
at the end.

Over bands, what travels between ranks is recorded too, with NCCL. What needs a number from another
rank on the host (softmax attention's lengths, a dilated convolution's wide halo, FreeU, masks of an
IP-Adapter) cannot be, and is called as ever; so is a network over gloo, or in displaced mode, and
whatever fails to be recorded, for want of memory say.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from engine.bands import ExactExchange, Traffic, current_exchange
from engine.bands.boundary import Boundary, with_boundary, without_boundary
from engine.linfusion import LinearAttention, self_attentions

logger = logging.getLogger(__name__)

LARGEST = 2**18
"""rows times columns of a latent beyond which a GPU is busy for longer than a host takes to launch,
and its memory is better not held: that of a recording cannot be used for anything else"""
FEWEST = 6
"""calls of a UNet below which it does not pay to record one"""


@contextmanager
def replayed(unet: UNet2DConditionModel, bands: bool = True) -> Iterator[None]:
    """Inside, calls of `unet` on a GPU are recorded and replayed.

    Its weights must stay where they are, and nothing may be attached or removed meanwhile.

    Args:
        bands: also where it works on bands, and what it sends is recorded with it.
    """
    boundary = _without_boundary(unet)  # which waits for others on the host: it stays in front
    base = type(unet)
    attributes = {"forward": _recording(base.forward), "__module__": base.__module__}
    unet.__class__ = type(base.__name__, (base,), attributes)
    unet.__dict__["_recordings"] = Recordings(bands)
    _put_in_front(unet, boundary)
    try:
        yield
    finally:
        _without_boundary(unet)
        unet.__class__ = base
        del unet.__dict__["_recordings"]
        _put_in_front(unet, boundary)


def _without_boundary(unet: Any) -> tuple[Any, Any] | None:
    if not isinstance(unet, Boundary):
        return None
    boundary = type(unet).__bases__[0], unet.layout
    without_boundary(unet)
    return boundary


def _put_in_front(unet: Any, boundary: tuple[Any, Any] | None) -> None:
    if boundary is not None:
        with_boundary(unet, *boundary)


def _recording(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a class of UNets, recorded where that can be."""

    @wraps(forward)  # the boundary looks up its arguments' names
    def recorded(unet: Any, *args: Any, **kwargs: Any) -> Any:
        call = dict(inspect.signature(forward).bind(unet, *args, **kwargs).arguments)
        del call["self"]
        plain = partial(forward, unet)
        if call.get("return_dict", True) or not _can_record(unet):
            return plain(**call)
        # What it depends on besides its arguments and weights.
        state = id(current_exchange()), unet.conv_in.dilation
        return unet._recordings.call(plain, call, state)

    return recorded


def _can_record(unet: Any) -> bool:
    """Whether no layer needs a number on the host, over the bands at hand."""
    if unet.conv_in.weight.device.type != "cuda" or torch.is_grad_enabled():
        return False
    exchange = current_exchange()
    if exchange is None or not unet._recordings.bands:
        return exchange is None
    linear = all(isinstance(module, LinearAttention) for _, module in self_attentions(unet))
    freeu = any(getattr(block, "s1", None) for block in unet.up_blocks)
    dilated = tuple(unet.conv_in.dilation) != (1, 1)
    by_nccl = "nccl" in str(dist.get_backend_config(exchange.mesh.group))
    return type(exchange) is ExactExchange and linear and by_nccl and not (dilated or freeu)


class Recordings:
    """All of one network, by what they depend on.

    Attributes:
        bands: whether forwards over bands are recorded.
    """

    def __init__(self, bands: bool) -> None:
        self.bands = bands
        self._recorded: dict[Any, Recording | str] = {}
        self._calls: Counter[Any] = Counter()
        self._pool: Any = None

    def call(self, forward: Any, call: dict[str, Any], state: tuple[Any, ...]) -> Any:
        """forward(**call), the third and later times by replaying what is recorded then."""
        leaves, shape = tree_flatten(call)
        key = (*state, shape, *map(_kind, leaves))
        self._calls[key] += 1
        if self._calls[key] == 3:
            self._recorded[key] = self._record(forward, leaves, shape)
        recording = self._recorded.get(key)
        return recording.replay(leaves) if isinstance(recording, Recording) else forward(**call)

    def _record(self, forward: Any, leaves: list[Any], shape: Any) -> "Recording | str":
        """Or why there is none. A forward sends the same, whether it is replayed or called."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return Recording.of(forward, leaves, shape, self._pool)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("UNet calls are not recorded, which costs time only: %s", reason)
            return reason


def _kind(leaf: Any) -> Any:
    """What must not differ between an argument and the recorded one."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Recording:
    """A forward's launches, and where they read and write.

    Attributes:
        arguments: all that were recorded, of which the tensors are copied to.
        results: in which the tensors are copied from.
        traffic: of the bands, counted again by each replay; with what one adds to it.
    """

    graph: torch.cuda.CUDAGraph
    arguments: list[Any]
    results: tuple[Tensor, ...]
    traffic: Traffic | None = None
    sent: Traffic | None = None

    @classmethod
    def of(cls, forward: Any, leaves: list[Any], shape: Any, pool: Any) -> "Recording":
        """Record a call that has been made before."""
        device = next(x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda)
        arguments = [
            torch.empty_like(x, device=device).copy_(x) if isinstance(x, Tensor) else x
            for x in leaves
        ]
        exchange = current_exchange()
        traffic = None if exchange is None else exchange.traffic
        before = deepcopy(traffic)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = forward(**tree_unflatten(arguments, shape))
        if traffic is None or before is None:
            return cls(graph, arguments, results)
        sent = traffic.since(before)
        traffic.bytes_sent, traffic.rounds = before.bytes_sent, before.rounds
        return cls(graph, arguments, results, traffic, sent)

    def replay(self, leaves: list[Any]) -> tuple[Tensor, ...]:
        """The results for arguments of the same kinds."""
        for ours, given in zip(self.arguments, leaves, strict=True):
            if isinstance(given, Tensor):
                ours.copy_(given)
        self.graph.replay()
        if self.traffic is not None and self.sent is not None:
            self.traffic.add(self.sent)
        return tuple(result.clone() for result in self.results)
