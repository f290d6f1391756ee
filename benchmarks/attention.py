"""Linear attention: ours, beside LinFusion's forward as its paper writes it, and beside softmax.

    python -m benchmarks.attention                               # 1k to 1M tokens, some minutes
    python -m benchmarks.attention --tokens 4096 16384 --dtype bfloat16
    python -m benchmarks.attention --models demo                 # as far, in a fraction of the time

    naive      y = x + MLP(x) for queries and keys, q = Wq y, k = Wk y', v = Wv x, split into heads
               by copies; then elu + 1, z = q . mean(k) + 1e-4, S = (k / sqrt n)^T (v / sqrt n) and
               out = Wo (q S / z) (arXiv:2409.02097, section 3), a tensor for every step
    plain      ours head by head, in blocks (`engine.kernels.formula`): what half precision takes
    ours       what the engine runs here: on GPUs `engine.kernels.fused`, elsewhere in fp32 and fp64
               `engine.kernels.streamed`
    softmax    the model's own: q, k, v, scaled_dot_product_attention, out

Printed, for the attentions of most tokens in SD-1.5 (8 heads of 40) and SDXL (10 of 64); if asked,
of the demo model (3 of 32):

    ms         CPU time of `--threads` threads, or a GPU's own time; median of the repeats
    outside    ms beside the products: less what this forward's own matrix products take alone, in
               the shapes in which it multiplies them and into memory that is there. Measured in the
               same turn; one per cent of the forward at least, since noise may say less than none.
    MB         by which a fresh process grows at its peak in one forward, its result included
    error      relative, in the Euclidean norm, to the naive forward in float64

All are run in turn, and ratios are medians over the turns. What would take longer than `--limit-s`,
or more memory than there is, by an estimate made before, is left out, and the reason is given. Time
does not leave out ours: over the limit it is run once and not repeated.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import COLOURS, GB, Aim, Noise
from engine import fuse
from engine.kernels import streamed
from engine.linfusion import LinearAttention

EPS = 1e-4
AIM_TOKENS = 16384
ERROR_TOKENS = 16384  # at most: the reference is in float64

# [n, C] that a forward makes at once, as measured and rounded up; half precision computes in fp32.
TENSORS = {"ours": 2, "plain": 6, "naive": 7, "softmax": 6}
HALF_PRECISION_TENSORS = 11
PRODUCT_TENSORS = 3  # that the products alone are multiplied in
ESTIMATE_TOKENS = 1024
MOST_OF_FREE = 0.6  # of the memory; others use it too


@dataclass(frozen=True)
class Shape:
    heads: int
    head_width: int

    @property
    def width(self) -> int:
        return self.heads * self.head_width


SHAPES = {"SD-1.5": Shape(8, 40), "SDXL": Shape(10, 64), "demo": Shape(3, 32)}


def parse_arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    sizes = [4**i * 1024 for i in range(6)]
    parser.add_argument("--tokens", type=int, nargs="+", default=sizes)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["SD-1.5", "SDXL"])
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[AIM_TOKENS])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--limit-s", type=float, default=8.0, help="that one forward may take")
    parser.add_argument(
        "--threads", type=int, default=1, help="of a CPU; several would count waiting as work"
    )
    return parser.parse_args()


# --- the forwards ---------------------------------------------------------------------------------


def naive(module: LinearAttention, x: Tensor) -> Tensor:
    """[B, n, C] -> [B, n, C]"""
    tokens = x.shape[1]
    query = _heads_to_batch(module.to_q(x + module.to_q_(x)), module.heads)
    key = _heads_to_batch(module.to_k(x + module.to_k_(x)), module.heads)
    value = _heads_to_batch(module.to_v(x), module.heads)
    query, key = F.elu(query) + 1, F.elu(key) + 1
    z = query @ key.mean(1, keepdim=True).transpose(1, 2) + EPS
    state = (key.transpose(1, 2) * tokens**-0.5) @ (value * tokens**-0.5)
    return module.to_out[0](_batch_to_heads(query @ state / z, module.heads))


def softmax(module: LinearAttention, x: Tensor) -> Tensor:
    """[B, n, C] -> [B, n, C]: as the model was trained, without the MLPs."""
    query, key, value = (
        linear(x).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for linear in (module.to_q, module.to_k, module.to_v)
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return module.to_out[0](mixed.transpose(1, 2).flatten(2))


def ours(module: LinearAttention, x: Tensor) -> Tensor:
    return module(x)


def plain(module: LinearAttention, x: Tensor) -> Tensor:
    with _not_streamed(), _not_fused(module):
        return module(x)


FORWARDS: dict[str, Callable[[LinearAttention, Tensor], Tensor]] = {
    "ours": ours,
    "plain": plain,
    "naive": naive,
    "softmax": softmax,
}


@contextmanager
def _not_streamed() -> Iterator[None]:
    with mock.patch.object(streamed, "can_stream", return_value=False):
        yield


@contextmanager
def _not_fused(module: LinearAttention) -> Iterator[None]:
    kind, module.__class__ = type(module), LinearAttention
    yield
    module.__class__ = kind


def _heads_to_batch(x: Tensor, heads: int) -> Tensor:
    """[B, n, heads * d] -> [B * heads, n, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _batch_to_heads(x: Tensor, heads: int) -> Tensor:
    """[B * heads, n, d] -> [B, n, heads * d]"""
    return x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2).contiguous()


# --- their products alone -------------------------------------------------------------------------


def whole_products(module: LinearAttention, x: Tensor) -> Callable[[], None]:
    """The naive forward's: eight of all tokens by C x C, and three of each head's own."""
    tokens, width = x.shape[1:]
    weight, out = module.to_q.weight.t(), torch.empty_like(x[0])
    by_head = _heads_to_batch(x, module.heads)
    mean = by_head[:, :1].transpose(1, 2).contiguous()
    state = by_head.new_empty(module.heads, width // module.heads, width // module.heads)
    mixed, sums = torch.empty_like(by_head), by_head.new_empty(module.heads, tokens, 1)

    def multiply() -> None:
        for _ in range(8):
            torch.mm(x[0], weight, out=out)
        torch.bmm(by_head, mean, out=sums)
        torch.bmm(by_head.transpose(1, 2), by_head, out=state)
        torch.bmm(by_head, state, out=mixed)

    return multiply


def streamed_products(module: LinearAttention, x: Tensor) -> Callable[[], None]:
    """Those of `engine.kernels.streamed`: eight a block by C x C, and one for the normalisers."""
    width, weight = x.shape[2], module.to_q.weight.t()
    blocks = list(streamed._blocks(x[0]))  # as many tokens at once as it takes
    out, sums = torch.empty_like(blocks[0]), blocks[0].new_empty(len(blocks[0]), module.heads)
    square, normalisers = x.new_zeros(width, width), x.new_empty(width, module.heads)

    def multiply() -> None:
        for block in blocks:
            for _ in range(7):
                torch.mm(block, weight, out=out[: len(block)])
            torch.mm(block, normalisers, out=sums[: len(block)])
            torch.addmm(square, block.t(), block, beta=0, out=square)

    return multiply


# --- measuring ------------------------------------------------------------------------------------


def build(shape: Shape, options: argparse.Namespace) -> LinearAttention:
    torch.manual_seed(0)
    module = LinearAttention(shape.width, heads=shape.heads, dim_head=shape.head_width)
    dtype = getattr(torch, options.dtype)
    module = module.to(common.default_device(), dtype).eval().requires_grad_(False)
    fuse.choose_kernels(module, fuse.kernels_for("auto", common.default_device(), dtype))
    return module


def tokens_of(module: LinearAttention, count: int) -> Tensor:
    """[1, n, C]"""
    weight = module.to_q.weight
    noise = torch.randn(1, count, weight.shape[1], generator=torch.Generator().manual_seed(count))
    return noise.to(weight.device, weight.dtype)


def measure_model(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of tokens and forward."""
    module, rows = build(SHAPES[model], options), []
    estimates = first_estimates(module)
    for count in sorted(options.tokens):
        why = {name: refusal(name, count, module, estimates, options) for name in FORWARDS}
        names = [name for name in FORWARDS if not why[name]]
        timed = time_in_turn(module, count, names, estimates, options)
        errors = errors_of(module, count, names) if count <= ERROR_TOKENS else {}
        for name in FORWARDS:
            row = {"model": model, "tokens": count, "forward": name, "left_out": why[name]}
            if name in timed:
                estimates[name] = Estimate(timed[name]["s"].median, count, name == "softmax")
                row |= timed[name] | {"error": errors.get(name), "mb": None}
            if name in timed and count in options.memory_tokens:
                row["mb"] = common.in_fresh_process(memory_mb, name, count, model, options)
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Estimate:
    """What a forward took for some tokens, and so will take for others."""

    s: float
    tokens: int
    is_quadratic: bool

    def of(self, tokens: int) -> float:
        return self.s * (tokens / self.tokens) ** (2 if self.is_quadratic else 1)


def first_estimates(module: LinearAttention) -> dict[str, Estimate]:
    """By few tokens, so that what is hopeless is not begun."""
    x, device = tokens_of(module, ESTIMATE_TOKENS), module.to_q.weight.device
    estimates = {}
    for name, forward in FORWARDS.items():
        forward(module, x)
        s = common.seconds(partial(forward, module, x), device)
        estimates[name] = Estimate(s, ESTIMATE_TOKENS, name == "softmax")
    return estimates


def refusal(
    name: str,
    count: int,
    module: LinearAttention,
    estimates: dict[str, Estimate],
    options: argparse.Namespace,
) -> str | None:
    """Why this forward is not run, if it is not."""
    needed, free = needed_bytes(name, count, module), free_bytes(module)
    if needed > MOST_OF_FREE * free:
        return (
            f"it would need {needed / GB:.1f} GB, over {MOST_OF_FREE:.0%} of the "
            f"{free / GB:.1f} GB that are free"
        )
    takes = estimates[name].of(count)
    if name != "ours" and takes > options.limit_s:
        return f"it would take about {takes:.2g} s, over --limit-s {options.limit_s:g}"
    return None


def needed_bytes(name: str, count: int, module: LinearAttention) -> int:
    """Of a forward, its tokens, and the products that are measured beside it."""
    weight = module.to_q.weight
    is_streamed = products_of(module, name) == "streamed products"
    tensors = TENSORS["plain" if name == "ours" and not is_streamed else name]
    if weight.element_size() == 2 and name in ("ours", "plain"):
        tensors = HALF_PRECISION_TENSORS
    tensors += 1 + (0 if is_streamed else PRODUCT_TENSORS)
    return tensors * count * weight.shape[1] * weight.element_size()


def free_bytes(module: LinearAttention) -> int:
    if module.to_q.weight.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def time_in_turn(
    module: LinearAttention,
    count: int,
    names: list[str],
    estimates: dict[str, Estimate],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    if not names:
        return {}
    x, device = tokens_of(module, count), module.to_q.weight.device
    functions: dict[str, Callable[[], object]] = {n: partial(FORWARDS[n], module, x) for n in names}
    makers = {"whole products": whole_products, "streamed products": streamed_products}
    for products in sorted({products_of(module, n) for n in names if n != "softmax"}):
        functions[products] = makers[products](module, x)
    once = "ours" in names and estimates["ours"].of(count) > options.limit_s
    measured = common.in_turn(
        functions,
        1 if once else options.repeats,
        partial(common.seconds, device=device),
        warm_up=not once,
    )
    outside = {
        n: beside(measured[n], measured[products_of(module, n)]) for n in names if n != "softmax"
    }
    return {
        n: {
            "s": Noise.of(measured[n]),
            "outside_s": Noise.of(outside[n]) if n in outside else None,
            "speed_up": ratio_to_naive(measured, n),
            "outside_speed_up": ratio_to_naive(outside, n),
        }
        for n in names
    }


def ratio_to_naive(measured: dict[str, list[float]], name: str) -> Noise | None:
    """The naive forward's time over this one's, if both were measured."""
    if "naive" not in measured or name not in measured:
        return None
    return common.ratio(measured["naive"], measured[name])


def products_of(module: LinearAttention, name: str) -> str:
    return (
        "streamed products" if name == "ours" and streamed.can_stream(module) else "whole products"
    )


def beside(whole: list[float], products: list[float]) -> list[float]:
    """Of each turn, what is left of the whole without the products."""
    return [max(a - b, 0.01 * a) for a, b in zip(whole, products, strict=True)]


def errors_of(module: LinearAttention, count: int, names: list[str]) -> dict[str, float]:
    x = tokens_of(module, count)
    expected = naive(deepcopy(module).double(), x.double())
    return {
        name: float((FORWARDS[name](module, x).double() - expected).norm() / expected.norm())
        for name in names
        if name != "softmax"
    }


def memory_mb(name: str, count: int, model: str, options: argparse.Namespace) -> float:
    """In a process of its own, which has done a small forward before."""
    torch.set_num_threads(options.threads)
    module = build(SHAPES[model], options)
    with torch.no_grad():
        FORWARDS[name](module, tokens_of(module, 1024))
        x = tokens_of(module, count)
        return common.peak_growth_mb(lambda: FORWARDS[name](module, x), module.to_q.weight.device)


# --- what it comes to -----------------------------------------------------------------------------


def aims(rows: list[dict[str, Any]]) -> list[Aim]:
    found = {(r["model"], r["forward"]): r for r in rows if r["tokens"] == AIM_TOKENS}
    listed = []
    for model in {r["model"]: None for r in rows if r["model"] != "demo"}:
        own, other = (found.get((model, name), {}) for name in ("ours", "naive"))
        faster = own.get("outside_speed_up")
        both = own.get("mb") and other.get("mb")
        listed += [
            Aim(
                f"{model}, 16k tokens: naive's time outside of the products over ours",
                faster.median if faster else None, 3, at_most=False,
            ),
            Aim(
                f"{model}, 16k tokens: our extra memory over naive's",
                own["mb"] / other["mb"] if both else None, 0.6,
            ),
        ]  # fmt: skip
    return listed


def print_rows(rows: list[dict[str, Any]]) -> None:
    columns = ["", "tokens", "ms", "(min - max)", "outside", "naive / it", "outside", "MB", "error"]
    cells = []
    for row in rows:
        title = f"{row['model']} {row['forward']}"
        if row["left_out"]:
            cells.append([title, row["tokens"], "left out", *[None] * 6])
            continue
        s, outside = row["s"], row["outside_s"]
        spread = f"({s.min * 1e3:.3g} - {s.max * 1e3:.3g})"
        cells.append([
            title, row["tokens"], s.median * 1e3, spread,
            outside and outside.median * 1e3, row["speed_up"] and row["speed_up"].median,
            row["outside_speed_up"] and str(row["outside_speed_up"]), row["mb"],
            None if row["error"] is None else f"{row['error']:.1e}",
        ])  # fmt: skip
    common.print_table(columns, cells)
    print()
    for row in rows:
        if row["left_out"]:
            named = f"{row['model']} {row['forward']}, {row['tokens']} tokens"
            print(f"left out: {named}: {row['left_out']}")
    print()


def draw(rows: list[dict[str, Any]], plt: Any) -> Any:
    """Time over tokens, and of 16k tokens: time by its parts, and memory."""
    models = list({row["model"]: None for row in rows})
    figure, grid = plt.subplots(
        len(models), 3, figsize=(11, 3.2 * len(models)), squeeze=False, layout="constrained",
        width_ratios=(1.6, 1, 1),
    )  # fmt: skip
    for axes, model in zip(grid, models, strict=True):
        own = [row for row in rows if row["model"] == model and not row["left_out"]]
        _draw_times(axes[0], model, own)
        # Where there is most to compare.
        compared = [row for row in own if row["forward"] == "naive"] or own
        largest = max(row["tokens"] for row in [row for row in own if row["mb"]] or compared)
        bars = [row for row in own if row["tokens"] == largest]
        _draw_parts(axes[1], bars)
        _draw_memory(axes[2], bars)
    return figure


def _draw_times(axes: Any, model: str, rows: list[dict[str, Any]]) -> None:
    for name in FORWARDS:
        points = [(row["tokens"], row["s"].median) for row in rows if row["forward"] == name]
        counts, seconds = zip(*points, strict=True) if points else ((), ())
        axes.plot(counts, seconds, "o-", ms=4, color=COLOURS[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", title=f"{model}: seconds of one forward")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda n, _: short(n))
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter(lambda s, _: f"{s:g}")
    axes.yaxis.set_minor_formatter(lambda s, _: "")
    axes.legend()


def short(tokens: float) -> str:
    return f"{tokens / 2**20:g}M" if tokens >= 2**20 else f"{tokens / 1024:g}k"


def _draw_parts(axes: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["outside_s"]]
    for place, row in enumerate(rows):
        outside, whole = row["outside_s"].median * 1e3, row["s"].median * 1e3
        axes.bar(place, whole - outside, color="#d5d5d5", label=None if place else "products")
        axes.bar(place, outside, bottom=whole - outside, color=COLOURS[row["forward"]])
        axes.annotate(f"+{outside:.0f}", (place, whole), ha="center", va="bottom")
    axes.set_xticks(range(len(rows)), [row["forward"] for row in rows])
    axes.margins(y=0.1)
    axes.set_title(f"{short(rows[0]['tokens'])} tokens: ms, products in grey")
    axes.grid(axis="x", visible=False)


def _draw_memory(axes: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["mb"]]
    if not rows:
        axes.set_axis_off()
        return
    colours = [COLOURS[row["forward"]] for row in rows]
    bars = axes.bar([row["forward"] for row in rows], [row["mb"] for row in rows], color=colours)
    axes.bar_label(bars, fmt="%.0f")
    axes.margins(y=0.1)
    axes.set_title("extra memory at the peak, MB")
    axes.grid(axis="x", visible=False)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    common.machine()  # before there is any load of our own
    with torch.no_grad():
        rows = [row for model in options.models for row in measure_model(model, options)]
    print_rows(rows)
    common.finish("attention", options, {"rows": rows}, aims(rows), partial(draw, rows))


if __name__ == "__main__":
    main()
