"""What a user names: models, as pipelines on the CPU or as configuration files alone, and pictures.

    load("demo")         weights and all
    describe("demo")     what its configuration files tell, in no time

A model is "demo", a diffusers folder, a hub id, or a single `.safetensors` file. LinFusion modules
come from beside it, from a folder, or from the hub (`engine.linfusion`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open

from engine.config import UserError
from engine.demo import WEIGHTS
from engine.linfusion import find_checkpoint, linearize, list_modules, name_checkpoint, read_config

_PAINTERS = (StableDiffusionPipeline.__name__, StableDiffusionXLPipeline.__name__)


@dataclass(frozen=True)
class Description:
    """A model without its weights.

    Attributes:
        unet, vae: their configurations, as diffusers keeps them.
        linear_modules: LinFusion's `modules_list`, or None for softmax attention.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    linear_modules: list[dict[str, Any]] | None

    @property
    def native_side(self) -> int:
        """The long side in pixels that the UNet was trained at."""
        sample = self.unet["sample_size"]
        return 8 * (max(sample) if isinstance(sample, list | tuple) else int(sample))

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> Self:
        """What describes a pipeline that is loaded already."""
        modules = list_modules(pipe.unet)
        return cls(dict(pipe.unet.config), dict(pipe.vae.config), modules or None)


def describe(model: str, linfusion: str = "auto") -> Description | None:
    """Everything that the configuration files tell; None for a single file, which has none.

    Args:
        model, linfusion: as for `load`.

    Raises:
        UserError: there is no such model, it is of another kind, or there are no such modules.
    """
    if Path(model).suffix == ".safetensors":
        if not Path(model).is_file():
            raise _unreadable(model, FileNotFoundError("no such file"))
        return None
    source = _model_source(model)
    try:
        index = DiffusionPipeline.load_config(source)
        unet = UNet2DConditionModel.load_config(source, subfolder="unet")
        _require_painter(model, index)
        vae = AutoencoderKL.load_config(source, subfolder="vae")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(model, error) from error
    if linfusion == "none":
        return Description(unet, vae, None)
    modules = read_config(find_checkpoint(linfusion, source, unet["cross_attention_dim"]))
    return Description(unet, vae, modules)


def count_text_parameters(model: str) -> int:
    """Weights of the text encoders of a model, by their configuration files; 0 for a single file.

    Raises:
        UserError: they are not readable.
    """
    if Path(model).suffix == ".safetensors":
        return 0
    source, count = _model_source(model), 0
    try:
        index = DiffusionPipeline.load_config(source)
        for part in ("text_encoder", "text_encoder_2"):
            _, name = index.get(part) or (None, None)
            if name is None:
                continue
            kind = getattr(transformers, name)
            config = kind.config_class.from_pretrained(source, subfolder=part)
            with torch.device("meta"):
                count += sum(weight.numel() for weight in kind(config).parameters())
    except (OSError, ValueError) as error:
        raise _unreadable(model, error) from error
    return count


def name_linfusion(model: str, linfusion: str, description: "Description") -> str:
    """The folder or the hub id of LinFusion modules that `linfusion` means, or "none"."""
    width = description.unet["cross_attention_dim"]
    return name_checkpoint(linfusion, _model_source(model), width)


def weight_files(model: str) -> dict[str, Path]:
    """The files that a model's weights come from, by their names in its folder.

    Args:
        model: "demo", a diffusers folder, a folder of LinFusion modules, a `.safetensors` file, or
            a hub id, of which nothing is known before it is in the cache.
    """
    if Path(model).suffix == ".safetensors":
        return {Path(model).name: Path(model)}
    source = Path(_model_source(model))
    if not source.is_dir():
        try:
            source = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            return {}
    index = DiffusionPipeline.load_config(source) if (source / "model_index.json").exists() else {}
    loaded = [name for name in index if name != "safety_checker" and (source / name).is_dir()]
    parts = [source / name for name in loaded] or [source]
    files = [file for part in parts for file in _weights_in(part)]
    return {file.relative_to(source).as_posix(): file for file in files}


def _weights_in(folder: Path) -> list[Path]:
    """As diffusers chooses: safetensors if there are any, and no variants such as fp16's."""
    for suffix in (".safetensors", ".bin"):
        names = re.compile(rf"(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?\{suffix}")
        if found := [file for file in folder.iterdir() if names.fullmatch(file.name)]:
            return found
    return []


def _require_painter(model: str, index: dict[str, Any]) -> None:
    if index.get("_class_name") not in _PAINTERS:
        raise UserError(
            f"model {model!r} is a {index.get('_class_name')}: the command line paints with "
            f"{' and '.join(_PAINTERS)}"
        )
    if index["vae"][1] != AutoencoderKL.__name__:
        raise UserError(
            f"model {model!r} decodes by a {index['vae'][1]}: the command line needs an "
            "AutoencoderKL, whose decoder it shares out"
        )


def load(model: str, linfusion: str = "auto", **options: Any) -> DiffusionPipeline:
    """A Stable Diffusion pipeline with LinFusion's linear attention, on the CPU.

    Args:
        model: "demo", a diffusers folder, a hub id, or a single `.safetensors` file.
        linfusion: LinFusion modules as in `engine.linearize`; "none" leaves softmax attention.
        options: for diffusers' `from_pretrained` or `from_single_file`, such as `dtype`. A folder's
            safety checker is left out unless it is passed.

    Raises:
        UserError: there is no such model, it is of another kind, or the modules do not fit.
    """
    try:
        if Path(model).suffix == ".safetensors":
            pipe = _single_file_class(Path(model)).from_single_file(model, **options)
        else:
            pipe = _from_folder(_model_source(model), options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(model, error) from error
    if linfusion != "none":
        linearize(pipe, linfusion)
    return pipe


def _from_folder(source: str, options: dict[str, Any]) -> DiffusionPipeline:
    index = DiffusionPipeline.load_config(source)
    # The safety checker looks at whole pictures on one device; no rank need have one.
    extras = {"safety_checker": None} if "safety_checker" in index else {}
    return DiffusionPipeline.from_pretrained(source, **{**extras, **options})


def _single_file_class(file: Path) -> type[DiffusionPipeline]:
    """SDXL keeps its text encoders under a name of its own; only the file's header is read."""
    with safe_open(file, "pt") as tensors:
        is_xl = any(key.startswith("conditioner.embedders.") for key in tensors.keys())  # noqa: SIM118
    return StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline


def _unreadable(model: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"model {model!r} is not readable: give 'demo', a diffusers folder, a .safetensors file or "
        f"a hub id ({reason})"
    )


def _model_source(model: str) -> str:
    return str(WEIGHTS) if model == "demo" else model


# --- pictures -------------------------------------------------------------------------------------


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture file as it is looked at, from its header.

    Raises:
        UserError: it is not readable.
    """
    with _opened(path) as picture:
        width, height = picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if turned else (height, width)


def read_picture(path: Path) -> np.ndarray:
    """A picture file as it is looked at: [H, W, 3], uint8.

    Raises:
        UserError: it is not readable.
    """
    with _opened(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"picture {path} is not readable ({reason}): give a PNG, JPEG, TIFF or WebP file"
        ) from error
