"""What writing a picture costs, in each format and on several ranks, and what it costs others.

    python benchmarks/output.py                                     # 16384 px, a quarter of an hour
    python benchmarks/output.py --px 4096 --ranks 1 2 --repeats 3
    python benchmarks/output.py --px 4096 --only png tif exr

The picture is a landscape of the demo's data at up to 4096 px, mirrored until it is large enough,
with grain of a standard deviation of 1.5 levels of 255. Every rank makes its own rows of it, which
is not measured. Each line of the table comes from processes of its own, of one thread each (pyvips
too: VIPS_CONCURRENCY=1; tifffile: maxworkers=1), which have written a small picture before. Files
are on disk (fsync) when the clock stops. Printed:

    CPU s      user and system, of all threads of all processes. Unlike seconds, they hardly depend
               on what else the machine does.
    busiest    CPU seconds of the process that took most
    wall s     until the last process was done. With more ranks than cores they say little.
    peak MB    that the largest process grew by at its peak, its rows included: of others, which
               want it whole, the picture
    bands      that, as a multiple of the process's own rows
    file MB    of all that was written: a .dzi with its tiles, a large picture with its preview

"with zlib" is ours with Python's zlib instead of isal, as where isal is not installed. Others
deflate at level 1 too, and after the same prediction from the left where they can (Pillow's PNG
chooses each row's filter); JPEGs are of quality 90 and 4:4:4.

After the table come the aims. Efficiency is the CPU seconds of one process over N times those of
the busiest of N: 1 is N times as fast on a machine with as many cores. Then one line of JSON, which
has the least and the most of all repeats. In both is the noise: the CPU seconds that one and the
same deflate took before each of the cases.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np
import pyvips
import tifffile
import torch
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from engine.bands import Mesh, Traffic, open_mesh
from engine.config import FileSettings
from engine.demo.landscapes import draw_scene, render
from engine.output import Target, deflate, writer_for
from engine.saving import save

MB = 1e6
SCENE = 65  # snowy mountains above a lake by day, with clouds
SCENE_PX = 4096
GRAIN = 1.5
BLOCK_ROWS = 64
"""rows that share a seed of the grain"""
WARM_PX = 512
QUALITY = 90
NEARLY_LINEAR = 0.9
"""the least efficiency that passes for it"""
PACKAGES = ("torch", "numpy", "isal", "OpenEXR", "pillow", "pyvips", "tifffile", "imagecodecs")


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        file: the name of the file, whose suffix chooses our writer.
        sample: numpy's name for the type of its numbers.
        zlib: ours, without isal.
        peer: what writes a whole picture instead of ours.
    """

    name: str
    file: str
    sample: str = "uint8"
    ranks: int = 1
    settings: dict[str, object] = field(default_factory=dict)
    zlib: bool = False
    peer: Callable[[Path, np.ndarray], None] | None = None


@dataclass(frozen=True)
class Cost:
    """What a case took once, or one rank's share of it."""

    cpu_s: float
    busiest_cpu_s: float
    wall_s: float
    peak_mb: float
    bands: float
    file_mb: float = 0.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--px", type=int, default=16384, help="side of the picture")
    parser.add_argument("--ranks", type=numbers, nargs="+", default=[[1, 2, 4]], metavar="N,...")
    parser.add_argument("--repeats", type=int, default=1, help="of everything; medians are printed")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="lines that contain one of these")
    parser.add_argument("--no-isal", action="store_true", help="ours with zlib only")
    parser.add_argument("--folder", type=Path, help="to write in; by default a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    options = parser.parse_args()
    options.ranks = sorted({rank for ranks in options.ranks for rank in ranks})
    if options.px < WARM_PX or options.px % 8:
        parser.error(f"--px must be a multiple of 8, and {WARM_PX} or more")
    if not 1 <= options.ranks[0] <= options.ranks[-1] <= WARM_PX // 8:
        parser.error(f"--ranks must lie between 1 and {WARM_PX // 8}")
    return options


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


# --- what is written ------------------------------------------------------------------------------


OURS = [
    Case("png", "picture.png"),
    Case("png, 16 bits", "picture.png", "uint16"),
    Case("tif", "picture.tif"),
    Case("tif, pyramid", "picture.tif", settings={"pyramid": True}),
    Case("exr, piz", "picture.exr", "float16"),
    Case("dzi", "picture.dzi", settings={"quality": QUALITY}),
    Case("jpg", "picture.jpg", settings={"quality": QUALITY}),
    Case("webp", "picture.webp", settings={"quality": QUALITY}),
]


def cases(options: argparse.Namespace) -> list[Case]:
    """In the order of the table; what the format has no room for is left out."""
    fitting = [
        case
        for case in OURS
        if options.px <= (writer_for(Path(case.file)).longest_side or options.px)
    ]
    ours = [
        Case(case.name, case.file, case.sample, ranks, case.settings, options.no_isal)
        for case in fitting
        for ranks in options.ranks
    ]
    if not options.no_isal:
        ours += [
            Case(f"{name}, with zlib", f"picture.{name}", zlib=True) for name in ("png", "tif")
        ]
    both = [*ours, *PEERS]
    return [c for c in both if not options.only or any(part in c.name for part in options.only)]


def pillow_png(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)


def pillow_jpeg(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, quality=QUALITY, subsampling=0)


def pyvips_png(path: Path, pixels: np.ndarray) -> None:
    pyvips.Image.new_from_array(pixels).pngsave(str(path), compression=1, filter="sub")


def pyvips_tiff(path: Path, pixels: np.ndarray) -> None:
    pyvips.Image.new_from_array(pixels).tiffsave(
        str(path),
        compression="deflate",
        level=1,
        predictor="horizontal",
        tile=True,
        tile_width=256,
        tile_height=256,
        pyramid=True,
        bigtiff=True,
    )


def pyvips_dzi(path: Path, pixels: np.ndarray) -> None:
    """At this quality libvips does not sub-sample colour."""
    pyvips.Image.new_from_array(pixels).dzsave(
        str(path.with_suffix("")), suffix=f".jpg[Q={QUALITY}]", tile_size=512, overlap=0
    )


def tifffile_tiff(path: Path, pixels: np.ndarray) -> None:
    tifffile.imwrite(
        path,
        pixels,
        bigtiff=True,
        tile=(256, 256),
        photometric="rgb",
        compression="adobe_deflate",
        compressionargs={"level": 1},
        predictor=True,
        maxworkers=1,
    )


PEERS = [
    Case("Pillow png", "picture.png", peer=pillow_png),
    Case("pyvips png", "picture.png", peer=pyvips_png),
    Case("tifffile tif", "picture.tif", peer=tifffile_tiff),
    Case("pyvips tif, pyramid", "picture.tif", peer=pyvips_tiff),
    Case("pyvips dzi", "picture.dzi", peer=pyvips_dzi),
    Case("Pillow jpg", "picture.jpg", peer=pillow_jpeg),
]


# --- the picture ----------------------------------------------------------------------------------


def cached_scene(folder: Path, px: int) -> Path:
    """A file with the landscape that the picture is made of."""
    side = min(px, SCENE_PX)
    path = folder / f"linfusion-engine-landscape-{SCENE}-{side}.npy"
    if not path.exists():
        progress(f"rendering a landscape of {side} px")
        scene = render(draw_scene(SCENE), side, side)
        unfinished = path.with_name(f".{path.stem}.{os.getpid()}.npy")
        np.save(unfinished, scene)
        unfinished.replace(path)
    return path


def make_rows(scene_path: Path, px: int, rows: range, sample: str) -> np.ndarray:
    """Rows of the picture, which do not depend on who asks for which: [h, px, 3]."""
    scene = np.load(scene_path, mmap_mode="r")
    pixels = np.empty((len(rows), px, 3), sample)
    for top in range(rows.start // BLOCK_ROWS * BLOCK_ROWS, rows.stop, BLOCK_ROWS):
        block = range(max(top, rows.start), min(top + BLOCK_ROWS, rows.stop))
        levels = grainy(scene, px, top)[block.start - top : block.stop - top]
        pixels[block.start - rows.start : block.stop - rows.start] = to_sample(levels, sample)
    return pixels


def grainy(scene: np.ndarray, px: int, top: int) -> np.ndarray:
    """The block of rows from `top` on, in levels from 0 to 255 and with fractions."""
    side = len(scene)
    place = np.arange(top, top + BLOCK_ROWS) % (2 * side)
    strip = scene[np.minimum(place, 2 * side - 1 - place)]
    strip = np.tile(np.concatenate([strip, strip[:, ::-1]], axis=1), (1, -(-px // (2 * side)), 1))
    chance = np.random.default_rng((SCENE, top))
    levels = chance.standard_normal((BLOCK_ROWS, px, 3), dtype=np.float32)
    levels *= GRAIN
    levels += strip[:, :px]
    return np.clip(levels, 0, 255, out=levels)


def to_sample(levels: np.ndarray, sample: str) -> np.ndarray:
    """As `engine.codec.to_samples`: rounded to nearest, or linear light."""
    if sample == "uint8":
        return np.rint(levels).astype(np.uint8)
    fine = np.rint(levels * 257).astype(np.uint16)
    return fine if sample == "uint16" else light()[fine]


@cache
def light() -> np.ndarray:
    """What sRGB's transfer function makes each of 65536 levels of."""
    level = np.linspace(0, 1, 1 << 16)
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float16)


# --- on every rank --------------------------------------------------------------------------------


def write_case(case: Case, folder: Path, scene_path: Path, px: int) -> Cost:
    """Make this rank's rows and write the file; what that took here."""
    torch.set_num_threads(1)
    if case.zlib:
        deflate.library = lambda: zlib
    with open_mesh() as mesh:
        warm = folder / "warm"
        if mesh.rank == 0:
            warm.mkdir(parents=True)
        mesh.barrier()
        # What libraries load once, before anything is measured.
        rows = own_rows(mesh, WARM_PX)
        write(case, mesh, warm, rows, make_rows(scene_path, WARM_PX, rows, case.sample))
        if mesh.rank == 0:
            shutil.rmtree(warm)
        before = resident_mb("VmRSS")
        rows = own_rows(mesh, px)
        pixels = make_rows(scene_path, px, rows, case.sample)
        return measure(case, mesh, folder, rows, pixels, before)


def measure(
    case: Case, mesh: Mesh, folder: Path, rows: range, pixels: np.ndarray, before_mb: float
) -> Cost:
    ctypes.CDLL(None).malloc_trim(0)  # what making the rows has left
    mesh.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    write(case, mesh, folder, rows, pixels)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    grown_mb = resident_mb("VmHWM") - before_mb
    mesh.barrier()  # nobody leaves, and is waited for, while another still writes
    return Cost(cpu, cpu, wall, grown_mb, grown_mb * MB / pixels.nbytes)


def write(case: Case, mesh: Mesh, folder: Path, rows: range, pixels: np.ndarray) -> None:
    path, side = folder / case.file, pixels.shape[1]
    if case.peer:
        case.peer(path, pixels)
        for file in files_in(folder):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        return
    target = Target(path, side, side, case.sample, FileSettings(**case.settings))
    save(target, mesh, Traffic(), rows, pixels, lambda seams: {"prompt": "snowy mountains"})


def own_rows(mesh: Mesh, height: int) -> range:
    """Bands begin where the latent's rows do."""
    edges = [height // 8 * rank // mesh.size * 8 for rank in range(mesh.size + 1)]
    return range(edges[mesh.rank], edges[mesh.rank + 1])


def files_in(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def resident_mb(field: str) -> float:
    """This process's memory now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / MB


# --- all cases ------------------------------------------------------------------------------------


def run_case(case: Case, folder: Path, scene_path: Path, options: argparse.Namespace) -> Cost:
    """Write the file once, by new processes."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=case.ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    shutil.rmtree(folder, ignore_errors=True)
    shares = elastic_launch(config, write_case)(case, folder, scene_path, options.px).values()
    file_mb = sum(file.stat().st_size for file in files_in(folder)) / MB
    if not options.keep:
        shutil.rmtree(folder)
    largest = max(shares, key=lambda share: share.peak_mb)
    return Cost(
        cpu_s=sum(share.cpu_s for share in shares),
        busiest_cpu_s=max(share.cpu_s for share in shares),
        wall_s=max(share.wall_s for share in shares),
        peak_mb=largest.peak_mb,
        bands=max(share.bands for share in shares),
        file_mb=file_mb,
    )


def run_all(
    folder: Path, scene_path: Path, options: argparse.Namespace
) -> tuple[list[dict[str, object]], list[float]]:
    """The lines of the table, and the CPU seconds of the same deflate before each case."""
    wanted, noise = cases(options), []
    costs: list[list[Cost]] = [[] for _ in wanted]
    for repeat in range(options.repeats):
        for case, taken in zip(wanted, costs, strict=True):
            noise.append(deflate_once())
            place = folder / f"{case.name.replace(', ', '-').replace(' ', '-')}-{case.ranks}"
            taken.append(run_case(case, place, scene_path, options))
            progress(f"{repeat + 1}/{options.repeats} {line(case.name, case.ranks, taken[-1])}")
    return [row(case, taken) for case, taken in zip(wanted, costs, strict=True)], noise


def deflate_once() -> float:
    data = (3 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype(np.int8)
    start = time.process_time()
    zlib.compress(data, 1)
    return time.process_time() - start


def row(case: Case, taken: list[Cost]) -> dict[str, object]:
    measured = [asdict(cost) for cost in taken]
    several = {key: [cost[key] for cost in measured] for key in measured[0]}
    return {
        "case": case.name,
        "ours": case.peer is None,
        "ranks": case.ranks,
        **{
            key: {f.__name__: round(f(values), 3) for f in (median, min, max)}
            for key, values in several.items()
        },
    }


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- printed --------------------------------------------------------------------------------------


def aims(rows: list[dict]) -> list[dict[str, object]]:
    """What was aimed at, what came out, and whether that is met; None where it was not measured."""
    cpu_s = {row["case"]: row["cpu_s"]["median"] for row in rows if row["ranks"] == 1}
    found = []
    for name, most in (("png", 0.5), ("tif", 0.25)):
        for ours in (name, f"{name}, with zlib"):
            if ours in cpu_s and "Pillow png" in cpu_s:
                share = cpu_s[ours] / cpu_s["Pillow png"]
                aim = f"{ours}: CPU s of one process, of Pillow png's, at most {most}"
                # Without isal there is no aim, but the figure is wanted.
                met = None if "zlib" in ours else share <= most
                found.append({"aim": aim, "value": share, "met": met})
    for row in rows:
        if row["ours"] and row["ranks"] > 1 and row["case"] in cpu_s:
            share = cpu_s[row["case"]] / row["ranks"] / row["busiest_cpu_s"]["median"]
            aim = f"{row['case']}: efficiency of {row['ranks']} ranks, at least {NEARLY_LINEAR}"
            found.append({"aim": aim, "value": share, "met": share >= NEARLY_LINEAR})
    return found


def machine() -> dict[str, object]:
    """Its processor and the versions of what is measured."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    encoder = tifffile.TIFF.COMPRESSORS[tifffile.COMPRESSION.ADOBE_DEFLATE]
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "libvips": ".".join(str(pyvips.version(part)) for part in range(3)),
        "tifffile_deflate": f"{encoder.__module__}.{encoder.__name__}",
    }


def line(name: str, ranks: int, cost: Cost) -> str:
    return (
        f"{name:<22}{ranks:>6}{cost.cpu_s:>9.1f}{cost.busiest_cpu_s:>9.1f}{cost.wall_s:>9.1f}"
        f"{cost.peak_mb:>9.0f}{cost.bands:>8.2f}{cost.file_mb:>9.1f}"
    )


def print_results(
    rows: list[dict], noise: dict[str, float], host: dict, options: argparse.Namespace
) -> None:
    packages = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    print(
        f"{options.px}x{options.px} px, {options.repeats} repeats; {host['cpu']}, "
        f"{host['cores']} cores, load {host['load_average']:.1f} before\n"
        f"Python {host['python']}, {packages}; libvips {host['libvips']}\n"
        f"tifffile deflates by {host['tifffile_deflate']}\n"
        f"noise: the same deflate took {noise['median']:.3f} CPU s "
        f"({noise['min']:.3f} - {noise['max']:.3f})\n"
    )
    print(
        f"{'':<22}{'ranks':>6}{'CPU s':>9}{'busiest':>9}{'wall s':>9}"
        f"{'peak MB':>9}{'bands':>8}{'file MB':>9}"
    )
    for row in rows:
        costs = {key: value["median"] for key, value in row.items() if isinstance(value, dict)}
        print(line(row["case"], row["ranks"], Cost(**costs)))
    print()
    for aim in aims(rows):
        verdict = {True: "met", False: "missed", None: "(no aim)"}[aim["met"]]
        print(f"{aim['aim']:<70}{aim['value']:>6.2f}  {verdict}")
    print(f"\nMore ranks than the {host['cores']} cores share them: see CPU s, not wall s.")


def main() -> None:
    options = parse_arguments()
    # The ranks inherit it.
    os.environ |= {"OMP_NUM_THREADS": "1", "VIPS_CONCURRENCY": "1"}
    host, start = machine(), time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="linfusion-engine-output-", dir=options.folder))
    try:
        scene_path = cached_scene(folder.parent, options.px)
        rows, deflated = run_all(folder, scene_path, options)
    finally:
        if options.keep:
            progress(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    noise = {f.__name__: round(f(deflated), 4) for f in (median, min, max)}
    print_results(rows, noise, host, options)
    print(json_line(rows, noise, host, options, time.perf_counter() - start))


def json_line(
    rows: list[dict],
    noise: dict[str, float],
    host: dict,
    options: argparse.Namespace,
    seconds: float,
) -> str:
    settings = {name: getattr(options, name) for name in ("px", "ranks", "repeats", "no_isal")}
    measured = {"noise_cpu_s": noise, "rows": rows, "aims": aims(rows), "seconds": round(seconds)}
    return json.dumps({"benchmark": "output", **settings, **host, **measured})


if __name__ == "__main__":
    main()
