"""The pictures as latents on disk: encoded once, by all ranks, and read as they are wanted.

Each unit of the source becomes one file, `NAME.safetensors`, with the latents in fp16 and the rest
(captions, shapes, what was broken) as JSON in its header. It appears under its name when it is
whole, so a killed run goes on where it was; the folder's name is a digest of all that the latents
depend on, so other data or another VAE get a folder of their own.

Means are kept, not spreads: Stable Diffusion's VAEs spread by less than a hundredth of them.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.bands import Mesh
from engine.config import UserError
from engine.distill.buckets import Shape, cut, nearest
from engine.distill.sources import Broken, Sample, Source, Unit
from engine.distill.teacher import Sizes, Teacher, sizes_of

_AT_ONCE_PX = 1 << 20  # encoded together


@dataclass(frozen=True)
class Entry:
    """A picture of the set, without its latent.

    Attributes:
        file, key: where the latent is.
        below: share of the noise schedule below which it is seen.
    """

    name: str
    file: Path
    key: str
    shape: Shape
    sizes: Sizes
    captions: list[str]
    below: float

    def latent(self) -> Tensor:
        """[4, H/8, W/8], fp32 on the CPU."""
        return _opened(self.file).get_tensor(self.key).float()


@dataclass(frozen=True)
class PictureSet:
    """All pictures as latents.

    Attributes:
        shapes: what is trained on, by shape.
        held_out: what is not.
        digest: names the source, the shapes and the VAE.
    """

    shapes: dict[Shape, list[Entry]]
    held_out: list[Entry]
    broken: list[Broken]
    digest: str

    def counts(self) -> dict[Shape, int]:
        return {shape: len(entries) for shape, entries in self.shapes.items()}


def encode_all(
    source: Source, shapes: list[Shape], teacher: Teacher, folder: Path, mesh: Mesh,
    doing: Callable[[str], object], told_to_stop: Callable[[], bool],
) -> tuple[list[Path], str] | None:  # fmt: skip
    """Encode what is not encoded yet, each rank its share; (the files, the digest).

    None where some rank was told to stop on the way.

    Args:
        shapes: to cut pictures to; without any they are of the source's own shapes.
        doing: is told of each unit.

    Raises:
        UserError: the folder cannot be written.
    """
    units = mesh.gather_objects(source.units() if mesh.rank == 0 else [])[0]
    own = _digest([asdict(unit) for unit in units], shapes, _vae_facts(teacher))
    digest = mesh.gather_objects(own)[0]  # another host may sum up otherwise
    place = folder / digest
    files = [place / f"{unit.name}.safetensors" for unit in units]

    def encode() -> None:
        try:
            place.mkdir(parents=True, exist_ok=True)
            for unit, file in list(zip(units, files, strict=True))[mesh.rank :: mesh.size]:
                if not file.exists() and not told_to_stop():
                    doing(f"encoding {unit.name}, one of {len(units)} parts of the pictures")
                    _encode(source, unit, shapes, teacher, file)
        except (OSError, SafetensorError) as error:  # the latter where the disk is full
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"latents cannot be kept in {place} ({reason}): choose another data.cache"
            ) from error

    mesh.agree(encode)
    return None if mesh.any(told_to_stop()) else (files, digest)


def read_set(files: list[Path], digest: str, held_out: int) -> PictureSet:
    """The set in these files.

    Names are put in an order that depends on nothing else, and the first are held out: no picture
    that was trained on comes to be held out when others are added, though for each of those that
    comes to be, one goes the other way.

    Raises:
        UserError: all pictures would be held out, or a file is not readable.
    """
    entries, broken = list[Entry](), list[Broken]()
    for file in files:
        facts = _facts_in(file)
        broken += [Broken(*pair) for pair in facts["broken"]]
        entries += [
            Entry(**{**e, "file": file, "shape": tuple(e["shape"]), "sizes": tuple(e["sizes"])})
            for e in facts["entries"]
        ]
    if len(entries) <= held_out:
        why = f", {len(broken)} more could not be used ({_named(broken)})" if broken else ""
        raise UserError(
            f"data.held_out: {held_out} of {len(entries)} pictures leave none to learn from{why}; "
            "choose fewer, or give more pictures"
        )
    entries.sort(key=lambda e: hashlib.blake2b(_spelt(e.name).encode(), digest_size=8).digest())
    shapes: dict[Shape, list[Entry]] = {}
    for entry in entries[held_out:]:
        shapes.setdefault(entry.shape, []).append(entry)
    return PictureSet(dict(sorted(shapes.items())), entries[:held_out], broken, digest)


def say_broken(broken: list[Broken]) -> str:
    """One line about pictures that were left out."""
    verb = "picture was" if len(broken) == 1 else "pictures were"
    return f"{len(broken)} {verb} left out: {_named(broken)}"


def _named(broken: list[Broken], most: int = 5) -> str:
    named = [f"{_spelt(one.name)} ({one.reason})" for one in broken[:most]]
    return ", ".join(named + (["..."] if len(broken) > most else []))


def _spelt(name: str) -> str:
    """For hashes and terminals: a file's name need not be UTF-8."""
    return name.encode(errors="backslashreplace").decode()


# --- one file -------------------------------------------------------------------------------------


def _encode(source: Source, unit: Unit, shapes: list[Shape], teacher: Teacher, file: Path) -> None:
    entries, broken, groups = list[dict[str, Any]](), list[Broken](), dict[Shape, list[Any]]()
    tensors: dict[str, Tensor] = {}
    for sample in source.read(unit):
        if isinstance(sample, Broken):
            broken.append(sample)
            continue
        facts, pixels = _cut(sample, shapes, str(len(entries)))
        entries.append(facts)
        group = groups.setdefault(facts["shape"], [])
        group.append((facts["key"], pixels))
        if len(group) * pixels[..., 0].size >= _AT_ONCE_PX:
            tensors |= _latents(teacher, groups.pop(facts["shape"]))
    for group in groups.values():
        tensors |= _latents(teacher, group)
    told = {"entries": entries, "broken": [(one.name, one.reason) for one in broken]}
    temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")  # another run may share the cache
    save_file(tensors, temporary, {"facts": json.dumps(told)})
    temporary.replace(file)


def _cut(sample: Sample, shapes: list[Shape], key: str) -> tuple[dict[str, Any], Any]:
    """(what an `Entry` is made of, pixels [H, W, 3])"""
    picture = sample.picture
    own = picture.height, picture.width
    made = cut(picture, nearest(shapes, *own) if shapes else own)
    shape = made.picture.height, made.picture.width
    facts = {
        "name": sample.name, "key": key, "shape": shape, "captions": sample.captions,
        "sizes": sizes_of(made.scaled, made.corner, shape), "below": sample.below,
    }  # fmt: skip
    return facts, np.asarray(made.picture)


def _latents(teacher: Teacher, group: list[Any]) -> dict[str, Tensor]:
    latents = teacher.encode(np.stack([pixels for _, pixels in group])).half()
    # Copies: views of one tensor are refused, since they would be written several times.
    return {
        key: latent.clone(memory_format=torch.contiguous_format)
        for (key, _), latent in zip(group, latents, strict=True)
    }


def _facts_in(file: Path) -> Any:
    try:
        return json.loads(_opened(file).metadata()["facts"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{file}: these latents are not readable ({error}); remove the file, and have "
            "data.cache on a disk that all ranks share"
        ) from error


@lru_cache(maxsize=256)
def _opened(file: Path) -> Any:
    return safe_open(file, "pt")


# --- what it depends on ---------------------------------------------------------------------------


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _vae_facts(teacher: Teacher) -> list[Any]:
    """A sum over the weights tells one VAE from another well enough."""
    vae = teacher.pipe.vae
    parts = [part for part in (vae.encoder, vae.quant_conv) if part is not None]
    weights = [weight for part in parts for weight in part.parameters()]
    total = sum(float(weight.detach().double().abs().sum()) for weight in weights)
    return [f"{total:.6e}", vae.config.scaling_factor, vae.config.shift_factor]
