"""Bands: how a network runs on some rows of a picture and still sees all of it.

A latent of H rows is cut into bands of rows, one per rank. A convolution needs a few rows of its
neighbours, a group norm three sums, linear attention one small matrix; nothing else looks further.

    mesh.py      the processes: device, group, time-outs, agreeing on errors
    axes.py      how many ranks share out pictures, sides of guidance, and rows
    rows.py      which rows belong to whom, how many halo rows a convolution needs
    exchange.py  what travels between ranks, and a count of it; one class per synchronisation mode
    displaced.py the mode that takes from the others what they had one step before
    context.py   the ambient bands: layers ask for the current exchange, and find none outside
    layers.py    convolution, group norm, down-sampling and softmax attention over bands
    functions.py what diffusers computes over whole pictures outside of any layer
    boundary.py  where whole tensors become bands and back: UNet, ControlNet, VAE
    resize.py    a picture in bands made larger or smaller
    stream.py    a band through the VAE in chunks of rows, each layer's rows computed once
    measure.py   what a stream's layers are told of the whole picture, and where it comes from
"""

from engine.bands.context import banded, current_exchange, mean_over_bands
from engine.bands.displaced import DisplacedExchange
from engine.bands.exchange import ExactExchange, Exchange, Traffic, fetch_rows
from engine.bands.mesh import Mesh, is_first_process, join_mesh, open_mesh, tell_deepspeed
from engine.bands.rows import max_bands, scale_rows, split_rows

__all__ = [
    "DisplacedExchange",
    "ExactExchange",
    "Exchange",
    "Mesh",
    "Traffic",
    "banded",
    "current_exchange",
    "fetch_rows",
    "is_first_process",
    "join_mesh",
    "max_bands",
    "mean_over_bands",
    "open_mesh",
    "scale_rows",
    "split_rows",
    "tell_deepspeed",
]
