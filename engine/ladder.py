"""The ladder: from a picture of a size that the model knows to one of any size, rung by rung.

    base   noise --all steps--> latent            384 x 256 px, say
    rung   decode, enlarge, encode --> reference  768 x 512
           noise it a little --the last steps--> latent
    rung   ...                                    1536 x 1024, and so on

Asked directly for a large picture, a diffusion model repeats what it knows at its own size. Each
rung therefore takes its layout from the one below, and adds the detail that the larger size has
room for. What happens between decoding and encoding is `engine.pipeline`'s; here is what happens to
latents, which are whole and the same on every rank, so that nothing here communicates and no number
of ranks changes the picture.

A strategy is a plain function of the model, a `State` and a `Rung`:

    sdedit      noise and denoise (Meng et al. 2021, SDEdit, arXiv:2108.01073; LinFusion's recipe
                for SD-1.5, arXiv:2409.02097)
    demofusion  besides, keep near the noised reference while noise is strong, and mix in what a
                dilated network, which sees as much of the picture as it would at the base's size,
                makes of it (Du et al. 2023, DemoFusion, arXiv:2311.16973; LinFusion's variant for
                SDXL, which dilates the convolutions instead of sampling interleaved pictures)
    wavelet     besides, keep the reference's low frequencies in the first steps (Kim et al. 2024,
                DiffuseHigh, arXiv:2406.18459)

All that the steps still to come depend on is in the `State`.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

from engine.bands import max_bands
from engine.bands.axes import choose_axes, fitting_groups
from engine.config import LadderSettings, Settings, UserError
from engine.diffusion import Denoiser, dilated

logger = logging.getLogger(__name__)


# --- the rungs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One size of the picture, and how it is denoised there.

    Attributes:
        index: 0 for the base.
        height, width: in pixels, multiples of 8.
        steps: of a denoising that began from pure noise.
        strength: the share of them that is run, 1 for the base.
        scale: how many times larger than the base, rounded: the dilation of `demofusion`.
    """

    index: int
    height: int
    width: int
    steps: int
    strength: float
    guidance_scale: float
    scale: int = 1

    @property
    def steps_run(self) -> int:
        """The steps that are left after noising to `strength`, as in diffusers' img2img."""
        return min(int(self.steps * self.strength), self.steps)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def rungs(settings: Settings, native: int, start: tuple[int, int] | None = None) -> list[Rung]:
    """The base and all rungs above it, the last of them as large as the picture.

    Args:
        native: the long side in pixels that the model was trained at.
        start: (height, width) of the picture to begin with (`ladder.upscale`), the base then being
            a rung of no steps.

    Raises:
        UserError: sides, steps or strengths that do not fit the picture.
    """
    ladder, height, width = settings.ladder, settings.height, settings.width
    long_side = max(height, width)
    if ladder.strategy == "none":
        base_side = long_side
    elif start:
        base_side = _upscaled_side(settings, start)
    else:
        base_side = min(ladder.base or native, long_side)
    sides = _sides(ladder, base_side, long_side)
    base_steps = 0 if start else settings.steps
    base = _sized(settings, base_side)
    made = [Rung(0, *(start or base), base_steps, 1.0, settings.guidance_scale)]
    options = _options(ladder, settings.steps, len(sides))
    for side, (steps, strength) in zip(sides, options, strict=True):
        size = (height, width) if side == long_side else _sized(settings, side)
        guidance = settings.guidance_scale
        if ladder.guidance_scale is not None:
            guidance = ladder.guidance_scale
        scale = max(1, round(side / base_side))
        made.append(Rung(len(made), *size, steps, strength, guidance, scale))
    for rung in made[1:]:
        _require_steps(rung)
    return made


def _sized(settings: Settings, side: int) -> tuple[int, int]:
    """(height, width) of the picture reduced to a long side of `side`, in multiples of 8."""
    scale = side / max(settings.height, settings.width)
    height, width = (
        max(8, 8 * round(length * scale / 8)) for length in (settings.height, settings.width)
    )
    return height, width


def _upscaled_side(settings: Settings, start: tuple[int, int]) -> int:
    """The long side of the user's picture, which must have the shape of what is wanted."""
    height, width = start
    fitting = max(8, 8 * round(settings.width * height / width / 8))
    if abs(settings.height - fitting) > 8:
        raise UserError(
            f"ladder.upscale: the picture is {width}x{height} px, and {settings.width}x"
            f"{settings.height} has another shape: ask for {settings.width}x{fitting}"
        )
    if max(settings.height, settings.width) <= max(start):
        raise UserError(
            f"ladder.upscale: the picture is {width}x{height} px already: ask for more than "
            f"{settings.width}x{settings.height}"
        )
    return max(start)


def _sides(ladder: LadderSettings, base: int, top: int) -> list[int]:
    """The long sides of the rungs above the base."""
    if ladder.sides:
        if ladder.sides[0] <= base or ladder.sides[-1] > top:
            raise UserError(
                f"ladder.sides: {', '.join(map(str, ladder.sides))} px do not lie between the "
                f"base's {base} and the picture's {top}: choose sides that do"
            )
        return [*(side for side in ladder.sides if side < top), top]
    # A hair less, since the logarithm of an exact power may come out a bit above it.
    count = math.ceil(math.log(top / base, ladder.growth) - 1e-9)
    between = {8 * round(base * (top / base) ** (rung / count) / 8) for rung in range(1, count)}
    return [*sorted(side for side in between if base < side < top), top] if count else []


def _options(ladder: LadderSettings, steps: int, count: int) -> list[tuple[int, float]]:
    """(steps, strength) of every rung above the base."""
    for name in ("steps", "strengths"):
        if len(getattr(ladder, name)) > max(count, 1):
            raise UserError(
                f"ladder.{name}: {len(getattr(ladder, name))} numbers for {count} rungs above the "
                "base: give one for each, or fewer"
            )
    strengths = ladder.strengths or _STRENGTHS[ladder.strategy](count)
    steps_of = _continued(ladder.steps or (steps,), count)
    return list(zip(steps_of, _continued(strengths, count), strict=True))


def _continued(numbers: Sequence[Any], count: int) -> list[Any]:
    """`count` numbers, of which the last one given goes on."""
    return [numbers[min(index, len(numbers) - 1)] for index in range(count)]


# As published: LinFusion's notebook for SD-1.5; its SDXL pipeline, falling to zero in even parts;
# DiffuseHigh's 15 of 50 steps.
_STRENGTHS: dict[str, Callable[[int], Sequence[float]]] = {
    "none": lambda count: (),
    "sdedit": lambda count: (0.4, 0.3, 0.2, 0.1),
    "demofusion": lambda count: [0.32 * (1 - rung / count) for rung in range(count)],
    "wavelet": lambda count: (0.3,),
}


def _require_steps(rung: Rung) -> None:
    if not rung.steps_run:
        raise UserError(
            f"ladder: {rung.strength:g} of {rung.steps} steps is not one step for the rung of "
            f"{rung} px: set ladder.steps to {math.ceil(1 / rung.strength)} or more there"
        )


def groups(settings: Settings, rung: Rung, ranks: int, row_multiple: int, guided: bool) -> int:
    """Into how many groups of ranks a rung's batch is shared out; each group cuts the rows.

    Args:
        row_multiple: rows of the latent that a band begins on a multiple of.
        guided: whether the two sides of guidance are computed at once.
    """
    asked = settings.mesh.guidance
    guidance = None if asked == "auto" else int(asked) if guided else 1
    wanted = choose_axes(ranks, guided=guided, guidance=guidance).groups
    return fitting_groups(ranks, wanted, max_bands(rung.height // 8, row_multiple))


# --- the state ------------------------------------------------------------------------------------


@dataclass
class State:
    """A picture in the making: all that the steps still to come depend on.

    Attributes:
        rung: its index.
        step: how many steps of this rung are done.
        latent: [1, C, H, W], noised as far as the next step expects.
        scheduler: a diffusers scheduler, with whatever it remembers of the steps before.
        generator: where the noise comes from, on the CPU, the same on every rank.
        reference: [1, C, H, W], the rung below, enlarged and encoded; None in the base rung.
        noise: [1, C, H, W], what the reference was noised with.
        anchor: (mean, standard deviation), [1, C, 1, 1] each, of the base's latent.
        colours: [1, 3, s, t], a thumbnail of the base's pixels, where its colours are kept.
    """

    rung: int
    step: int
    latent: Tensor
    scheduler: Any
    generator: torch.Generator
    reference: Tensor | None = None
    noise: Tensor | None = None
    anchor: tuple[Tensor, Tensor] | None = None
    colours: Tensor | None = None


def begin_base(
    rung: Rung, scheduler: Any, generator: torch.Generator, like: Tensor, channels: int
) -> State:
    """Pure noise of the base rung's size; `like` has the device and dtype for it."""
    scheduler = fresh_scheduler(scheduler, rung, like.device)
    shape = (1, channels, rung.height // 8, rung.width // 8)
    noise = _draw(shape, generator, like)
    return State(0, 0, noise * scheduler.init_noise_sigma, scheduler, generator)


def begin_rung(
    rung: Rung,
    scheduler: Any,
    reference: Tensor,
    generator: torch.Generator,
    below: State | None = None,
    colours: Tensor | None = None,
) -> State:
    """The enlarged picture's latent `reference`, noised as far as the rung's strength says.

    Args:
        scheduler: of any state; it is copied without what it remembers.
        below: the state that the reference was made of, or None if it is the user's picture.
    """
    scheduler = fresh_scheduler(scheduler, rung, reference.device)
    noise = _draw(reference.shape, generator, reference)
    first = _timesteps(scheduler, rung)[:1]
    latent = scheduler.add_noise(reference, noise, first)
    if below is None:
        anchor = channel_statistics(reference)
    else:
        anchor = below.anchor or channel_statistics(below.latent)
    return State(rung.index, 0, latent, scheduler, generator, reference, noise, anchor, colours)


def _draw(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Noise with the device and dtype of `like`, never drawn in half precision.

    torch up to 2.11 draws that from uniform numbers of 11 bits (of 8 in bfloat16): other noise
    than in fp32, so another picture, and none beyond 3.9 (3.3) standard deviations.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    noise: Tensor = randn_tensor(shape, generator=generator, device=like.device, dtype=dtype)
    return noise.to(like.dtype)


def fresh_scheduler(scheduler: Any, rung: Rung, device: torch.device) -> Any:
    """A scheduler of the same configuration that has not made a step of the rung yet."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(rung.steps, device=device)
    if rung.index and hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index((rung.steps - rung.steps_run) * fresh.order)
    return fresh


def _timesteps(scheduler: Any, rung: Rung) -> Tensor:
    """The timesteps that the rung runs. A scheduler of order 2 has two for each step."""
    timesteps: Tensor = scheduler.timesteps[(rung.steps - rung.steps_run) * scheduler.order :]
    return timesteps


def calls(scheduler: Any, rung: Rung) -> int:
    """How often the rung's strategy steps: what a progress bar counts."""
    return len(_timesteps(fresh_scheduler(scheduler, rung, torch.device("cpu")), rung))


def channel_statistics(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, [1, C, 1, 1] each."""
    deviation, mean = torch.std_mean(latent.float(), dim=(2, 3), keepdim=True)
    return mean.to(latent.dtype), deviation.to(latent.dtype)


# --- strategies -----------------------------------------------------------------------------------

OnStep = Callable[[State], object]
Strategy = Callable[[Denoiser, State, Rung, LadderSettings, OnStep], None]


def _steps_left(state: State, rung: Rung, on_step: OnStep) -> Iterator[Tensor]:
    """The timestep of each step still to do; counts it in `state` when it is done."""
    for timestep in _timesteps(state.scheduler, rung)[state.step :]:
        yield timestep
        state.step += 1
        on_step(state)


def sdedit(
    model: Denoiser, state: State, rung: Rung, options: LadderSettings, on_step: OnStep
) -> None:
    """Denoise, and nothing else: the base rung of all strategies, and every rung of SDEdit.

    arXiv:2108.01073, algorithm 1.
    """
    for t in _steps_left(state, rung, on_step):
        state.latent = model.step(state, model(model.scaled(state, t), t), t)


def demofusion(
    model: Denoiser, state: State, rung: Rung, options: LadderSettings, on_step: OnStep
) -> None:
    """Skip residual, a dilated branch beside the plain one, and the base's channel statistics.

    With the cosine factor f = (1 + cos(pi (T - t) / T)) / 2 and c_i = f^alpha_i
    (arXiv:2311.16973, "Skip Residual" and "Dilated Sampling"; LinFusion's variant):

        z <- (1 - c_1) z + c_1 (reference noised to t)           skip residual
        (1 - c_2) plain(z) + c_2 dilated(blur(z))                 dilated branch
        blur: Gaussian of sigma (0.99 c_3 + 0.01) sigma_0, channel statistics restored

    Both branches' predictions are mixed rather than their steps' results, which is the same, since
    a step is an affine function of the prediction, and asks the scheduler once only. At the end
    each channel gets the base's mean and standard deviation.
    """
    assert state.reference is not None
    assert state.anchor is not None
    trained = model.trained_timesteps
    for t in _steps_left(state, rung, on_step):
        factor = 0.5 * (1 + math.cos(math.pi * (trained - float(t)) / trained))
        hold = factor**options.skip_residual_exponent
        noised = state.scheduler.add_noise(state.reference, state.noise, t[None])
        state.latent = torch.lerp(state.latent, noised, hold)
        prediction = model(model.scaled(state, t), t)
        weight = factor**options.dilation_exponent
        if rung.scale > 1 and weight >= options.threshold:
            sigma = options.gaussian_sigma * (0.99 * factor**options.gaussian_exponent + 0.01)
            blurred = _blur(state.latent, 2 * rung.scale - 1, sigma)
            with dilated(model.unet, rung.scale):
                other = model(model.scaled(state, t, blurred), t)
            prediction = torch.lerp(prediction, other, weight)
        elif rung.scale > 1:
            logger.info("%s px, t=%d: dilated branch left out, weight %.4f", rung, t, weight)
        state.latent = model.step(state, prediction, t)
    state.latent = with_statistics(state.latent, *state.anchor)


def with_statistics(latent: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """`latent` [1, C, H, W] shifted and scaled to have this mean and standard deviation."""
    own_mean, own_deviation = channel_statistics(latent)
    return (latent - own_mean) * (deviation / own_deviation) + mean


def _blur(latent: Tensor, size: int, sigma: float) -> Tensor:
    """A Gaussian filter of `size` x `size`, zeros outside; channel statistics as they were."""
    places = torch.arange(size, device=latent.device, dtype=torch.float32) - (size - 1) / 2
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(latent.dtype).expand(latent.shape[1], 1, 1, -1)
    channels, reach = latent.shape[1], size // 2
    across = F.conv2d(latent, kernel, padding=(0, reach), groups=channels)
    down = F.conv2d(across, kernel.transpose(2, 3), padding=(reach, 0), groups=channels)
    return with_statistics(down, *channel_statistics(latent))


def wavelet(
    model: Denoiser, state: State, rung: Rung, options: LadderSettings, on_step: OnStep
) -> None:
    """In the first steps, the predicted clean picture keeps the reference's low frequencies.

    The structure guidance of arXiv:2406.18459, with the Haar wavelet and in the latent: the paper
    transforms decoded pictures, but to decode and encode at every step would cost more than the
    step.
    """
    assert state.reference is not None
    for t in _steps_left(state, rung, on_step):
        scaled = model.scaled(state, t)
        prediction = model(scaled, t)
        if state.step < options.wavelet_steps:
            clean = model.clean(scaled, prediction, t)
            change = low_frequencies(state.reference - clean, options.wavelet_levels)
            prediction = model.with_clean_changed(prediction, change, t)
        state.latent = model.step(state, prediction, t)


def low_frequencies(x: Tensor, levels: int) -> Tensor:
    """What the inverse Haar transform makes of the LL band alone: means over 2^levels squares.

    A picture that ends within a square is continued by its last row and column.
    """
    size = 2**levels
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, -width % size, 0, -height % size), mode="replicate")
    means = F.avg_pool2d(padded, size)
    return F.interpolate(means, scale_factor=size, mode="nearest")[..., :height, :width]


STRATEGIES: dict[str, Strategy] = {
    "none": sdedit,
    "sdedit": sdedit,
    "demofusion": demofusion,
    "wavelet": wavelet,
}


def climb(
    model: Denoiser, state: State, rung: Rung, options: LadderSettings, on_step: OnStep
) -> None:
    """Do what is left of a rung: the base by plain denoising, the others by the strategy."""
    strategy = STRATEGIES[options.strategy] if rung.index else sdedit
    strategy(model, state, rung, options, on_step)
