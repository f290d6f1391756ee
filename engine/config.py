"""Typed settings: every flag of the command line and every key of a YAML file.

How they are read, and how mistakes are answered, is `engine.parsing`. A group is a pydantic model:
`ladder: {strategy: sdedit}` in the file, `--ladder.strategy sdedit` on the command line.

This is the lowest floor: it imports neither torch nor diffusers, so that a mistake is answered and
help is printed at once.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from engine.parsing import UserError, parse

__all__ = [
    "CheckpointSettings",
    "CodecSettings",
    "FileSettings",
    "LadderSettings",
    "MemorySettings",
    "MeshSettings",
    "Settings",
    "UserError",
]


def _spell_bool(value: object) -> object:
    """YAML's `true` as the word: Python counts it as the number 1, which nobody means."""
    return str(value).lower() if isinstance(value, bool) else value


def _multiple_of_8(pixels: int) -> int:
    """The VAE halves a picture three times, so a side must be divisible by 8."""
    if pixels > 0 and pixels % 8 == 0:
        return pixels
    below, above = pixels // 8 * 8, pixels // 8 * 8 + 8
    works = f"{below} or {above}" if below > 0 else "8"
    raise ValueError(f"{pixels} px is not a positive multiple of 8; {works} would work")


Whole = Annotated[int, BeforeValidator(_spell_bool)]
Real = Annotated[float, BeforeValidator(_spell_bool), Field(allow_inf_nan=False)]
Pixels = Annotated[Whole, AfterValidator(_multiple_of_8)]


def _spell_whole(value: object) -> object:
    """YAML's 2 as the word that is one of a few choices."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _split_commas(value: object) -> object:
    """The command line's `20,15` and a YAML file's single number, as the list that they mean."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",")]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _sha256(value: str) -> str:
    if value == "any" or re.fullmatch(r"[0-9a-f]{64}", value):
        return value
    raise ValueError(f"{value!r} is no SHA-256; write its 64 digits in lower case, or any")


Sha256 = Annotated[str, AfterValidator(_sha256)]

Wholes = Annotated[tuple[Annotated[Whole, Field(ge=1)], ...], BeforeValidator(_split_commas)]
Reals = Annotated[tuple[Real, ...], BeforeValidator(_split_commas)]


class Group(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def idle(self) -> dict[str, str]:
        """The settings that the others leave without effect, and what they go with."""
        return {}

    @model_validator(mode="after")
    def _refuse_idle(self) -> Self:
        """A setting that would be ignored is a mistake that somebody would want to hear of."""
        for name, needs in self.idle().items():
            if name in self.model_fields_set:
                raise ValueError(f"{name} goes with {needs}: choose it, or leave {name} out")
        return self

    def effective(self) -> dict[str, Any]:
        """What has an effect, for a picture's metadata. JSON-able."""
        facts = self.model_dump(mode="json", exclude=set(self.idle()), exclude_none=True)
        return {name: value for name, value in facts.items() if value != []}


class MeshSettings(Group):
    """How the ranks share out the work; the band axis is what the other axes leave."""

    image: Whole = Field(
        default=1,
        ge=1,
        description="Groups of ranks that paint pictures of a job side by side, each its own.",
    )
    guidance: Annotated[Literal["auto", "1", "2"], BeforeValidator(_spell_whole)] = Field(
        default="auto",
        description="Groups of ranks for the two sides of guidance: 2 computes them apart.",
    )
    synchronisation: Literal["exact", "displaced"] = Field(
        default="exact",
        description="'exact' waits for the other bands at every layer; 'displaced' takes what they "
        "had a step ago, for small pictures on many GPUs, and changes the picture a little.",
    )
    warmup_steps: Whole = Field(
        default=4, ge=1, description="Exact steps at the start of a picture in displaced mode."
    )

    def idle(self) -> dict[str, str]:
        exact = self.synchronisation == "exact"
        return {"warmup_steps": "mesh.synchronisation displaced"} if exact else {}


_DEMOFUSION_ONLY = dict.fromkeys(
    (
        "preset",
        "branch_threshold",
        "skip_residual_exponent",
        "dilation_exponent",
        "gaussian_exponent",
        "gaussian_sigma",
    ),
    "ladder.strategy demofusion",
)
_WAVELET_ONLY = dict.fromkeys(("wavelet_steps", "wavelet_levels"), "ladder.strategy wavelet")


class LadderSettings(Group):
    """From a picture of a size that the model knows, rung by rung, to the one that is wanted."""

    strategy: Literal["none", "sdedit", "demofusion", "wavelet"] = Field(
        default="none",
        description="How a rung is made of the one below; 'none' paints at full size at once.",
    )
    base: Pixels | None = Field(
        default=None,
        description="Long side of the base rung in pixels; by default what the model was made for.",
    )
    growth: Real = Field(
        default=2.0, gt=1, le=4, description="By how much a rung is larger than the last, at most."
    )
    sides: Wholes = Field(
        default=(),
        description="Long sides of the rungs above the base, in pixels, instead of even growth.",
    )
    steps: Wholes = Field(
        default=(),
        description="Denoising steps of each rung above the base, were it to begin from noise; "
        "the last number goes on for the others. By default as many as the base has.",
    )
    strengths: Annotated[
        tuple[Annotated[Real, Field(gt=0, le=1)], ...], BeforeValidator(_split_commas)
    ] = Field(
        default=(),
        description="Share of those steps that each rung runs, by noising that far; the last "
        "number goes on for the others. By default the strategy's own.",
    )
    guidance_scale: Annotated[Real, Field(ge=0)] | None = Field(
        default=None, description="guidance_scale of the rungs above the base, if another."
    )
    upscale: Path | None = Field(
        default=None, description="A picture to start from instead of painting a base rung."
    )
    upscale_sha256: Sha256 = Field(
        default="any", description="Hash of that file, as a finished picture names it."
    )
    keep_colours: Whole = Field(
        default=0,
        ge=0,
        description="Long side of a thumbnail of the base that every rung keeps; with 0 colours "
        "drift as the VAE makes them.",
    )
    preset: Literal["exact", "fast"] = Field(
        default="exact", description="'fast' leaves out branches that weigh less than a hundredth."
    )
    branch_threshold: Annotated[Real, Field(ge=0, le=1)] | None = Field(
        default=None, description="Weight under which a branch is left out; overrides the preset."
    )
    skip_residual_exponent: Real = Field(
        default=3.0, gt=0, description="How fast the hold of the rung below fades (alpha_1)."
    )
    dilation_exponent: Real = Field(
        default=1.0, gt=0, description="How fast the weight of the dilated branch fades (alpha_2)."
    )
    gaussian_exponent: Real = Field(
        default=1.0, gt=0, description="How fast the dilated branch's blur fades (alpha_3)."
    )
    gaussian_sigma: Real = Field(
        default=0.8, gt=0, description="Blur of the dilated branch's input, in latent pixels."
    )
    wavelet_steps: Whole = Field(
        default=5, ge=1, description="Steps at the start of a rung that keep the low frequencies."
    )
    wavelet_levels: Whole = Field(
        default=1, ge=1, le=5, description="Which frequencies are low: those of 2^levels pixels."
    )

    def idle(self) -> dict[str, str]:
        if self.strategy == "none":
            others = set(type(self).model_fields) - {"strategy"}
            return dict.fromkeys(sorted(others), "a ladder.strategy such as sdedit")
        return {
            **({} if self.strategy == "demofusion" else _DEMOFUSION_ONLY),
            **({} if self.strategy == "wavelet" else _WAVELET_ONLY),
            **({"growth": "rungs that grow evenly, not with ladder.sides"} if self.sides else {}),
            **({"base": "a base that is painted, not with ladder.upscale"} if self.upscale else {}),
            **({} if self.upscale else {"upscale_sha256": "ladder.upscale"}),
        }

    @model_validator(mode="after")
    def _sides_grow(self) -> Self:
        if list(self.sides) != sorted(set(self.sides)):
            raise ValueError("sides must grow from rung to rung: list them from small to large")
        return self

    @property
    def threshold(self) -> float:
        """The weight under which a branch is left out."""
        if self.branch_threshold is not None:
            return self.branch_threshold
        return 0.01 if self.preset == "fast" else 0.0


class CodecSettings(Group):
    """How pictures become latents and latents pictures."""

    mode: Literal["auto", "exact", "streaming"] = Field(
        default="auto",
        description="'exact' sees the whole picture at every layer; 'streaming' passes it through "
        "in chunks, by statistics of a smaller one, in little memory; 'auto' is exact if it fits.",
    )
    statistics_px: Whole = Field(
        default=512,
        ge=64,
        description="Long side of the thinned picture that streaming models its statistics on.",
    )
    passes: Whole = Field(
        default=2,
        ge=0,
        description="Streams through the whole picture that only measure; each costs one more.",
    )
    chunk_rows: Whole = Field(
        default=8, ge=1, description="Latent rows that pass through a streaming codec at a time."
    )
    rungs: Annotated[tuple[Literal["exact", "streaming"], ...], BeforeValidator(_split_commas)] = (
        Field(
            default=(),
            description="What 'auto' means on each rung, as a finished picture says it.",
        )
    )

    def asked(self, rung: int) -> Literal["auto", "exact", "streaming"]:
        """The mode of a rung, by its index; the last one named goes on for the others."""
        return self.rungs[min(rung, len(self.rungs) - 1)] if self.rungs else self.mode

    def idle(self) -> dict[str, str]:
        streams = "codec.mode streaming or auto"
        idle = ("statistics_px", "passes", "chunk_rows") if self.mode == "exact" else ()
        only_auto = {} if self.mode == "auto" else {"rungs": "codec.mode auto"}
        return dict.fromkeys(idle, streams) | only_auto


class MemorySettings(Group):
    """Less memory for some time; none of it changes the picture."""

    guidance_in_turn: bool = Field(
        default=False, description="The two sides of guidance one after the other, not at once."
    )
    token_chunks: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None,
        description="Feed-forwards and attention in that many chunks of tokens; 8 to 32 are usual.",
    )
    row_chunks: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None,
        description="Residual blocks and up-sampling in that many chunks of rows; 8 to 32 are "
        "usual.",
    )
    inplace_activations: bool = Field(
        default=False, description="Without chunks: activations overwrite what they are made of."
    )
    skips_on_host: bool = Field(
        default=False, description="A GPU's skip tensors wait in the memory of the host."
    )
    sharded_weights: bool = Field(
        default=False, description="Each rank keeps its share of the UNet's weights (FSDP)."
    )
    limit_gb: Annotated[Real, Field(gt=0)] | None = Field(
        default=None, description="GB (10^9 bytes) that a rank may use; by default what is there."
    )


class FileSettings(Group):
    """How the picture is written; the suffix of `output` chooses the format."""

    bits: Annotated[Literal["auto", "8", "16"], BeforeValidator(_spell_whole)] = Field(
        default="auto",
        description="Bits of a number: 8 or 16 in .png and .tif, 16 (half float) in .exr, 8 in "
        "others; 'auto' is 8 where there is a choice.",
    )
    quality: Whole = Field(
        default=90, ge=1, le=100, description="Of .jpg and .webp files and of the tiles of a .dzi."
    )
    view: bool = Field(
        default=False,
        description="Beside the file, the same picture as a .dzi with its page, to look at.",
    )
    tiles: Literal["jpg", "png"] = Field(
        default="jpg", description="Format of the tiles of a .dzi; png keeps every bit."
    )
    pyramid: bool = Field(
        default=False, description="Smaller copies of the picture in a .tif, for viewers."
    )
    compression: Literal["piz", "zip"] = Field(
        default="piz", description="Of an .exr: piz is smaller on grain, zip on what is smooth."
    )

    def idle(self) -> dict[str, str]:
        return {} if self.tiles == "jpg" else {"quality": "file.tiles jpg"}


class CheckpointSettings(Group):
    """What is kept of a picture in the making, so that an interrupted job can go on."""

    every: Whole = Field(
        default=0,
        ge=0,
        description="Steps from one checkpoint to the next; with 0 there is one at the end of each "
        "rung, and when the job is told to stop.",
    )
    folder: Path | None = Field(
        default=None, description="Where checkpoints are; by default beside the picture."
    )


class Settings(BaseModel):
    """Paint one picture from a sentence, on as many ranks as the launcher started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(
        default="snowy mountains above a lake at sunset",
        description="What to paint.",
    )
    negative_prompt: str = Field(default="", description="What to keep out of the picture.")
    height: Pixels = Field(default=256, description="Height in pixels, a multiple of 8.")
    width: Pixels = Field(default=384, description="Width in pixels, a multiple of 8.")
    seed: Whole = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="Seed of the noise: the same seed, the same picture, on any number of ranks.",
    )
    steps: Whole = Field(default=30, ge=1, description="Denoising steps.")
    guidance_scale: Real = Field(
        default=4.0,
        ge=0,
        description="How strictly to follow the prompt; 1 and below switch guidance off.",
    )
    model: str = Field(
        default="demo",
        description="'demo' (the shipped landscapes), a diffusers folder, or a hub id.",
    )
    linfusion: str = Field(
        default="auto",
        description="LinFusion modules: 'auto' (those that fit the model), 'none' (softmax "
        "attention), a folder, or a hub id.",
    )
    model_sha256: Sha256 = Field(
        default="any",
        description="Hash of the model's weights as a finished picture names it; others are "
        "refused.",
    )
    linfusion_sha256: Sha256 = Field(
        default="any", description="The same for the LinFusion modules."
    )
    output: Path = Field(
        default=Path("outputs/picture.png"),
        description="The file to write; its suffix chooses the format: .png, .tif, .exr, .dzi (to "
        "look at in a browser), .jpg or .webp.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute; 'auto' takes the GPUs where there are any."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16", "float64"] = Field(
        default="auto", description="Precision of the networks; 'auto' suits the device."
    )
    kernels: Literal["auto", "plain", "fused"] = Field(
        default="auto",
        description="How norms, linear attention and what lies between large products compute: "
        "'plain' by torch, 'fused' by Triton in fewer passes, pictures lying channels last; 'auto' "
        "is fused on GPUs.",
    )
    graphs: Literal["auto", "all", "off"] = Field(
        default="auto",
        description="Whether a GPU replays recorded UNet calls where they are small (CUDA graphs); "
        "'auto' of whole pictures, 'all' of bands too, which several GPUs have not run yet.",
    )
    mesh: MeshSettings = Field(
        default=MeshSettings(), description="How the ranks share out the work."
    )
    ladder: LadderSettings = Field(
        default=LadderSettings(), description="How a large picture grows from a small one."
    )
    codec: CodecSettings = Field(
        default=CodecSettings(), description="How latents become pictures."
    )
    memory: MemorySettings = Field(
        default=MemorySettings(), description="How to live in little memory."
    )
    file: FileSettings = Field(default=FileSettings(), description="How the picture is written.")
    checkpoint: CheckpointSettings = Field(
        default=CheckpointSettings(), description="What is kept of a picture in the making."
    )
    resume: bool = Field(
        default=False,
        description="Go on from the checkpoint of an interrupted job, on any number of ranks; a "
        "picture that is finished is left alone.",
    )
    progress: Literal["auto", "bars", "plain", "openjd", "alf", "json", "none"] = Field(
        default="auto",
        description="How to say how far it is: 'auto' is bars on a terminal, the others are lines "
        "for machines.",
    )
    plan: bool = Field(
        default=False,
        description="Only say what it would take: rows, memory, bytes, disk, and time.",
    )
    timeout_s: Real = Field(
        default=600.0,
        gt=0,
        le=30 * 24 * 3600.0,
        description="Seconds after which a rank that waits for another one gives up.",
    )
    stall_s: Real = Field(
        default=300.0,
        gt=0,
        description="Seconds without any progress after which the job fails and names the rank.",
    )

    @model_validator(mode="after")
    def _no_idle_negative_prompt(self) -> Self:
        if self.negative_prompt and self.guidance_scale <= 1:
            raise ValueError(
                "negative_prompt works by guidance, which a guidance_scale of 1 or less switches "
                "off: raise it, or leave negative_prompt out"
            )
        return self

    @model_validator(mode="after")
    def _no_displaced_branches(self) -> Self:
        if self.ladder.strategy == "demofusion" and self.mesh.synchronisation == "displaced":
            raise ValueError(
                "mesh.synchronisation displaced would hand one branch of demofusion what the other "
                "one sent: choose exact, or ladder.strategy sdedit or wavelet"
            )
        return self

    @model_validator(mode="after")
    def _no_stale_checkpoints(self) -> Self:
        if self.checkpoint.every and self.mesh.synchronisation == "displaced":
            raise ValueError(
                "checkpoint.every would lose what is on its way between ranks in displaced mode: "
                "leave it out, there is a checkpoint at the end of each rung"
            )
        return self

    @model_validator(mode="after")
    def _no_idle_kernels(self) -> Self:
        if self.kernels == "fused" and self.dtype == "float64":
            raise ValueError(
                "kernels fused are of fp32, fp16 and bf16: choose another dtype, or leave kernels "
                "out"
            )
        return self

    @classmethod
    def load(
        cls,
        argv: Sequence[str] | None = None,
        read: Callable[[Path], dict[str, Any]] | None = None,
    ) -> Self:
        """The settings of a command line (default: sys.argv[1:]) and of the `--config` file in it.

        `read` is how the file is read, by default as YAML. Raises UserError for every mistake.
        `--help` prints help and raises SystemExit(0).
        """
        return parse(cls, argv, read)

    def provenance(self) -> dict[str, Any]:
        """Everything that determines the picture, for the picture's metadata. JSON-able."""
        elsewhere = {"output", "device", "timeout_s", "mesh", "memory", "plan", "codec", "ladder"}
        elsewhere |= {"file", "model_sha256", "linfusion_sha256"}
        elsewhere |= {"checkpoint", "resume", "progress", "stall_s", "kernels", "graphs"}
        facts = self.model_dump(mode="json", exclude=elsewhere)
        facts |= {"codec": self.codec.effective(), "ladder": self.ladder.effective()}
        if self.ladder.upscale is not None:  # the next job may begin in another folder
            facts["ladder"]["upscale"] = str(self.ladder.upscale.absolute())
        if self.mesh.synchronisation != "exact":
            stale = {"synchronisation", "warmup_steps"}
            facts |= {"mesh": self.mesh.model_dump(mode="json", include=stale)}
        return facts
