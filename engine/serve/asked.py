"""What a request may say, and the pictures that it comes to.

The shape is OpenAI's, with what a diffusion model has besides: seed, steps, guidance_scale,
negative_prompt. A field that this service knows but cannot honour is refused unless it asks for
what happens anyway (`quality: auto`), and so is a field that it does not know.
"""

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine import output
from engine.config import Real, UserError, Whole
from engine.serve.errors import ApiError
from engine.serve.jobs import SUFFIXES, Job, OutputFormat, Picture
from engine.serve.settings import Base, ServeSettings

T = TypeVar("T")
_SIZE = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")
_LARGEST_SEED = 2**63 - 1
LARGEST_INLINE_PX = 4096
"""a side of what may be answered in base64: what is larger is better fetched than held twice"""


def _only(allowed: tuple[Any, ...], instead: str) -> BeforeValidator:
    """Of a field that OpenAI has and this service cannot honour, what happens anyway."""

    def check(value: Any) -> Any:
        if value in allowed:
            return value
        raise ValueError(f"{str(value)[:40]!r} cannot be had; {instead}")

    return BeforeValidator(check)


_Quality = Annotated[str, _only(("auto",), "leave it out, and choose steps")]
_Background = Annotated[str, _only(("auto", "opaque"), "pictures are opaque: leave it out")]
_Stream = Annotated[bool, _only((False,), "ask POST /v1/images, and its events")]


class LongRequest(BaseModel):
    """One picture, to be asked after later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1, max_length=32000)
    size: str = Field(default="auto", description="Width x height in pixels, or auto.")
    seed: Annotated[Whole, Field(ge=0, le=_LARGEST_SEED)] | None = None
    steps: Annotated[Whole, Field(ge=1)] | None = None
    guidance_scale: Annotated[Real, Field(ge=0)] | None = None
    negative_prompt: str | None = Field(default=None, max_length=32000)
    output_format: OutputFormat = "png"
    model: str | None = Field(default=None, description="The one that is served, or nothing.")
    user: str | None = Field(default=None, max_length=256, description="Kept in the record.")
    quality: _Quality = "auto"
    background: _Background = "auto"

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """OpenAI takes null for what is left out."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    def pictures(self, base: Base, limits: ServeSettings) -> list[Picture]:
        """What is to be painted.

        Raises:
            ApiError: it cannot be, or is not allowed to.
        """
        return self._pictures(1, base, limits)

    def _pictures(self, count: int, base: Base, limits: ServeSettings) -> list[Picture]:
        if self.model not in (None, base.settings.model):
            said = f"model: {self.model!r} is not served; {base.settings.model!r} is, or leave it"
            raise ApiError(404, f"{said} out", "model_not_found", "model")
        first = self._first(base)
        if first.seed + count - 1 > _LARGEST_SEED:
            raise _refused("seed", f"{count} seeds from {first.seed} on go beyond {_LARGEST_SEED}")
        _check_limits(first, limits)
        _check_engine(first, base)
        return [first.model_copy(update={"seed": first.seed + i}) for i in range(count)]

    def _first(self, base: Base) -> Picture:
        width, height = _size_of(self.size, base)
        return Picture(
            prompt=self.prompt,
            negative_prompt=_either(self.negative_prompt, base.settings.negative_prompt),
            height=height,
            width=width,
            seed=_either(self.seed, secrets.randbelow(2**32)),
            steps=_either(self.steps, base.settings.steps),
            guidance_scale=_either(self.guidance_scale, base.settings.guidance_scale),
            output_format=self.output_format,
            user=self.user,
        )


class GenerationRequest(LongRequest):
    """OpenAI's: up to ten pictures, with consecutive seeds, to be waited for."""

    n: Whole = Field(default=1, ge=1, le=10)
    response_format: Literal["url", "b64_json"] = "url"
    stream: _Stream = False

    def pictures(self, base: Base, limits: ServeSettings) -> list[Picture]:
        """What is to be painted. Raises ApiError: it cannot be, or is not allowed to."""
        found = self._pictures(self.n, base, limits)
        longest = max(found[0].width, found[0].height)
        if self.response_format == "b64_json" and longest > LARGEST_INLINE_PX:
            raise _refused(
                "response_format",
                f"b64_json is for up to {LARGEST_INLINE_PX} px a side, and the picture has "
                f"{longest}; ask for url",
            )
        return found


def for_ranks(job: Job, base: Base, path: str) -> dict[str, Any]:
    """The settings of a job as the ranks take them, over the base settings."""
    picture = job.picture.model_dump(exclude={"output_format", "user"})
    return {**picture, "output": path, "file": {"view": True}, "resume": True, **_beside(base)}


def _beside(base: Base) -> dict[str, Any]:
    """Checkpoints are in the job's folder, wherever the engine's settings would have them."""
    return {} if base.settings.checkpoint.folder is None else {"checkpoint": {"folder": None}}


def _refused(param: str, said: str) -> ApiError:
    return ApiError(400, f"{param}: {said}", "invalid_value", param)


def _size_of(size: str, base: Base) -> tuple[int, int]:
    """(width, height) in pixels."""
    if size == "auto":
        return base.settings.width, base.settings.height
    if (sides := _SIZE.fullmatch(size)) is None:
        raise _refused("size", f"{size[:40]!r} is no size; write one such as 1024x768, or auto")
    return int(sides[1]), int(sides[2])


def _check_limits(picture: Picture, limits: ServeSettings) -> None:
    """What the operator allows."""
    width, height = picture.width, picture.height
    if max(width, height) > limits.largest_side_px:
        raise _refused("size", f"{width}x{height} is over {limits.largest_side_px} px a side")
    if width * height > limits.largest_pixels:
        raise _refused("size", f"{width}x{height} is over {limits.largest_pixels} pixels in all")
    if picture.steps > limits.most_steps:
        raise _refused("steps", f"{picture.steps} are too many; up to {limits.most_steps} may be")


def _check_engine(picture: Picture, base: Base) -> None:
    """What the engine would say, said at once: the ranks may be hours away."""
    asked = picture.model_dump(exclude={"output_format", "user"})
    try:
        base.with_job(asked)
    except UserError as error:
        name = re.findall(r"\w+", str(error))[0]
        param = {"height": "size", "width": "size"}.get(name, name)
        known = param if param in LongRequest.model_fields else None
        raise ApiError(400, str(error), "invalid_value", known) from None
    longest = output.WRITERS[SUFFIXES[picture.output_format]].longest_side
    if longest is not None and max(picture.width, picture.height) > longest:
        format_ = picture.output_format
        raise _refused("output_format", f"{format_} has at most {longest} px a side; png has more")


def _either(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
