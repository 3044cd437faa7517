"""`python3 build.py`: build this robot's engines from the bundle's ONNX files, and record the machine that built them.

TensorRT is used where it works, otherwise ONNX Runtime and OpenVINO. On a Jetson without TensorRT the build fails. Otherwise the
GPU would stay unused without notice.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import List, Optional, Sequence, TypedDict

from .. import json_text, registry
from ..backends.base import PRECISIONS, Backend, EngineInfo, load_info
from ..backends.tensorrt.build import TIMING_CACHE
from ..backends.tensorrt.run import built_elsewhere
from ..engine import BACKENDS, chosen_elsewhere
from ..errors import EngineError, RuntimeUnavailable, naming
from ..files import sha256_file
from ..measure import golden, jetson
from ..measure.int8_file import build_suited, choice
from ..secure import built_here
from ..secure.signed_manifest import BundleRefused, written
from .bundle import ENGINES, HERE, Bundle, open_bundle, outside, trusted
from .command_line import Parser, answer, positive, run_command, say

BUILT = "build.json"


class BuildOptions(TypedDict, total=False):
    """Options of a build, from `--workspace-mib`, `--timing-cache` and `--int8-images`. None: TensorRT's default."""

    workspace_mib: Optional[int]
    timing_cache: Optional[Path]
    int8_images: bool


class Built(TypedDict):
    """One engine in the JSON line that `build.py` prints."""

    engine: str  # name of its folder
    onnx: str  # file in the bundle
    library: str  # version of the engine library
    seconds: Optional[float]  # build time; null where the engine was up to date


def main(argv: Optional[Sequence[str]] = None, directory: Path = HERE) -> int:
    """Build the engines, print them as one JSON line on stdout, and return the exit code."""
    parser = Parser(prog="build.py", description=__doc__)
    parser.add_argument("--runtime", choices=sorted(BACKENDS), action="append", help="default: those that work here")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="default: all in the bundle")
    parser.add_argument("--workspace-mib", type=positive, help="limit of TensorRT's scratch memory")
    parser.add_argument(
        "--timing-cache",
        type=Path,
        help="file of an earlier TensorRT build on this device (default: the last one here)",
    )
    able = " and ".join(registry.RUNTIMES[name].title for name in registry.with_option(registry.INT8_IMAGES))
    parser.add_argument("--int8-images", action="store_true", help=f"INT8 engines of {able} take images as INT8 values")
    parser.add_argument("--out", type=Path, help=f"folder of the engines (default: {ENGINES} in the bundle)")
    parser.add_argument("--force", action="store_true", help="also rebuild engines that are up to date")
    options = parser.parse_args(argv)

    def action() -> int:
        bundle = open_bundle(directory)
        rows = build(
            bundle,
            outside(bundle, options.out or directory / ENGINES, "--out"),
            choose_runtimes(options.runtime),
            options.precision or bundle.precisions,
            workspace_mib=options.workspace_mib,
            timing_cache=options.timing_cache,
            int8_images=options.int8_images,
            force=options.force,
        )
        answer(json.dumps({"bundle": bundle.about(), "engines": rows}))
        return 0

    return run_command(action)


def choose_runtimes(asked: Optional[Sequence[str]]) -> List[str]:
    """Return the runtimes for which engines are built: the requested runtimes, or a default.

    If `asked` is None or empty, the default is the runtime for the GPU if it works, else the runtimes for the CPU.

    Raises:
        RuntimeUnavailable: a requested runtime does not work here, this is a Jetson without TensorRT, or no runtime works.
    """
    wanted = list(dict.fromkeys(asked or BACKENDS))
    missing = {name: problem for name in wanted for problem in [BACKENDS[name].probe()] if problem is not None}
    if asked:
        if missing:
            raise RuntimeUnavailable("; ".join(missing.values()), "or choose another --runtime")
        return wanted
    found = [name for name in registry.names(gpu=True) if name not in missing]
    if found:
        return found[-1:]
    if "l4t" in jetson.state():
        raise RuntimeUnavailable(
            f"a Jetson without TensorRT: {missing['tensorrt']}", "or --runtime onnxruntime for its CPU"
        )
    found = [name for name in registry.names(gpu=False) if name not in missing]
    if not found:
        raise RuntimeUnavailable("; ".join(missing.values()), "one of them is needed")
    return found


def build(
    bundle: Bundle,
    out: Path,
    runtimes: Sequence[str],
    precisions: Sequence[str],
    workspace_mib: Optional[int] = None,
    timing_cache: Optional[Path] = None,
    int8_images: bool = False,
    force: bool = False,
) -> List[Built]:
    """Build an engine for each runtime and precision, each in its own folder below `out`.

    If `force`, `workspace_mib` or `timing_cache` is set, engines that are up to date are also rebuilt.

    Raises:
        EngineError: the bundle has no ONNX file for a precision, or a library rejects it.
        BundleRefused: an ONNX file changed after the bundle was verified.
    """
    if (workspace_mib is not None or timing_cache is not None) and not all(
        _has_timing_cache(runtime) for runtime in runtimes
    ):
        raise EngineError(f"--workspace-mib and --timing-cache are for TensorRT; --runtime is {', '.join(runtimes)}")
    able = registry.with_option(registry.INT8_IMAGES)
    if int8_images and not (set(able) & set(runtimes) and "int8" in precisions):
        raise EngineError(
            f"--int8-images is for INT8 engines of {' and '.join(able)}; --runtime is {', '.join(runtimes)}, --precision "
            f"{', '.join(precisions)}"
        )
    # an existing engine may have been built without these options
    force = force or workspace_mib is not None or timing_cache is not None
    rows: List[Built] = []
    for runtime in runtimes:
        for precision in dict.fromkeys(precisions):
            stems = bundle.forms(runtime, precision)
            if not stems:
                raise EngineError(
                    f"{bundle.directory}: no {precision} ONNX for {runtime}; it has {sorted(bundle.onnx)}"
                )
            folder = out / f"{runtime}-{precision}"
            as_int8 = int8_images and runtime in able and precision == "int8"
            ready = None if force else _up_to_date(folder, bundle, stems, runtime, as_int8)
            if ready is not None:
                say(f"{folder.name}: up to date")
                rows.append(ready)
                continue
            say(f"{folder.name}: building from {' or '.join(bundle.onnx[stem] for stem in stems)}")
            options: BuildOptions = {"int8_images": as_int8} if runtime in able else {}
            if _has_timing_cache(runtime):
                last = folder / TIMING_CACHE
                ours = last.is_file() and trusted(bundle, folder)
                options = {"workspace_mib": workspace_mib, "timing_cache": timing_cache or (last if ours else None)}
            rows.append(_build(bundle, stems, runtime, precision, folder, options))
    return rows


def _build(
    bundle: Bundle, stems: Sequence[str], runtime: str, precision: str, folder: Path, options: BuildOptions
) -> Built:
    """Build the engine in a temporary folder beside `folder`, then replace `folder`."""
    files = {bundle.directory / bundle.onnx[stem]: stem for stem in stems}
    for onnx, stem in files.items():
        if sha256_file(onnx) != bundle.onnx_sha256(stem):
            raise BundleRefused(f"{onnx}: changed while in use; refused, copy the bundle again")
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for left in (partial, old):
        shutil.rmtree(str(left), ignore_errors=True)
    before, start = jetson.state(), time.time()

    def wrong(engine: Backend, info: EngineInfo) -> Optional[str]:
        return golden.check(bundle.directory, engine, info)["reason"]

    try:
        os.makedirs(str(partial))  # fail now if the folder cannot be written, not after an hour of building
        with naming(partial):
            if len(files) > 1:
                onnx = build_suited(runtime, list(files), partial, wrong, bundle.names, bundle.imgsz)
            else:
                BACKENDS[runtime].build(onnx, partial, precision, bundle.names, bundle.imgsz, **options)
            stem = files[onnx]
            info = load_info(partial, bundle.onnx_sha256(stem))
            if info.tried:
                say(f"{folder.name}: built from {choice(onnx.name, info.tried)}")
            made: Built = {
                "engine": folder.name,
                "onnx": bundle.onnx[stem],
                "library": info.library,
                "seconds": round(time.time() - start, 1),
            }
            given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
            document = dict(
                made, schema=1, bundle=bundle.about(), runtime=runtime, precision=precision,
                onnx_sha256=info.onnx_sha256, options=given, device=before, clocks_after=jetson.clocks(), at=round(start),
            )  # fmt: skip
            written(partial / BUILT, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("utf-8"))
        built_here.record(partial, needed=not trusted(bundle, partial))
    except BaseException:
        shutil.rmtree(str(partial), ignore_errors=True)  # an unfinished engine is of no use
        raise
    if folder.exists():
        os.replace(str(folder), str(old))
    os.replace(str(partial), str(folder))
    shutil.rmtree(str(old), ignore_errors=True)
    return made


def _has_timing_cache(runtime: str) -> bool:
    return runtime in registry.with_option("timing_cache")


def _up_to_date(folder: Path, bundle: Bundle, stems: Sequence[str], runtime: str, int8_images: bool) -> Optional[Built]:
    """Return the row of an engine that is up to date. None: it is not.

    An engine is up to date if it is intact, trusted, takes INT8 images only if asked to, and was built from one of these ONNX files by
    the installed library version. If it runs on a GPU, it must also have been built on this GPU. If its file was chosen among several,
    that must have been on this processor.
    """
    try:
        info = load_info(folder)
        stem = next(stem for stem in stems if bundle.onnx_sha256(stem) == info.onnx_sha256)
        library = json_text.read(folder / BUILT)["library"]
    except (EngineError, OSError, ValueError, KeyError, TypeError, StopIteration):
        return None  # absent, damaged, or built from another ONNX file
    if (len(stems) > 1) != bool(info.tried) or chosen_elsewhere(info):
        return None  # its file was chosen among others, or for another processor
    if bool(info.options.get(registry.INT8_IMAGES)) != int8_images:
        return None  # it takes other images
    if registry.RUNTIMES[runtime].gpu and built_elsewhere(info) is not None:
        return None  # built on another GPU, for example on a disk from another robot
    if not trusted(bundle, folder):
        return None  # it came with the bundle
    if not library == info.library == library_version(runtime):
        return None
    return {"engine": folder.name, "onnx": bundle.onnx[stem], "library": str(library), "seconds": None}


def library_version(runtime: str) -> str:
    """Return the version of the installed engine library. The runtime's `probe` must have imported it."""
    return str(sys.modules[registry.RUNTIMES[runtime].module or runtime].__version__)
