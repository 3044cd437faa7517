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
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, TypedDict

from .. import json_text, registry
from ..backends.base import POLICY, PRECISIONS, Backend, EngineInfo, load_info
from ..backends.tensorrt.build import TIMING_CACHE
from ..backends.tensorrt.run import built_elsewhere
from ..detect.cascade import engines, joined
from ..engine import BACKENDS, build_cascade, chosen_elsewhere
from ..errors import EngineError, RuntimeUnavailable, naming
from ..files import sha256_file
from ..measure import golden, jetson
from ..measure.int8_file import build_suited, choice
from ..secure import built_here
from ..secure.signed_manifest import BundleRefused, written
from .bundle import CASCADE, ENGINES, HERE, Bundle, open_bundle, outside, trusted
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
    onnx: str  # file in the bundle; of a cascade: both, joined by " then "
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
            options.precision,
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
    precisions: Optional[Sequence[str]] = None,
    workspace_mib: Optional[int] = None,
    timing_cache: Optional[Path] = None,
    int8_images: bool = False,
    force: bool = False,
) -> List[Built]:
    """Build an engine for each runtime and precision, each in its own folder below `out`. Build the cascade of the bundle, too.

    If `precisions` is None, all precisions of the bundle are built. If `force`, `workspace_mib` or `timing_cache` is set, engines that
    are up to date are also rebuilt. `int8_images` is for INT8 engines alone, not for those of the cascade.

    Raises:
        EngineError: the bundle has no ONNX file for a precision, none of the runtimes takes both files of the cascade, or a library
            rejects a file.
        BundleRefused: an ONNX file changed after the bundle was verified.
    """
    if (workspace_mib is not None or timing_cache is not None) and not all(
        _has_timing_cache(runtime) for runtime in runtimes
    ):
        raise EngineError(f"--workspace-mib and --timing-cache are for TensorRT; --runtime is {', '.join(runtimes)}")
    wanted = list(dict.fromkeys(bundle.precisions if precisions is None else precisions))
    able = registry.with_option(registry.INT8_IMAGES)
    if int8_images and not (set(able) & set(runtimes) and "int8" in wanted):
        raise EngineError(
            f"--int8-images is for INT8 engines of {' and '.join(able)}; --runtime is {', '.join(runtimes)}, --precision "
            f"{', '.join(wanted)}"
        )
    # an existing engine may have been built without these options
    force = force or workspace_mib is not None or timing_cache is not None
    cascading = _for_cascade(bundle, runtimes, precisions)
    rows: List[Built] = []
    for runtime in runtimes:
        for precision in wanted:
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
            options = _options(bundle, runtime, folder, workspace_mib, timing_cache)
            if runtime in able:
                options["int8_images"] = as_int8
            rows.append(_build(bundle, stems, runtime, precision, folder, options))
    for runtime in cascading:
        folder = out / f"{runtime}-{CASCADE}"
        ready = None if force else _cascade_up_to_date(folder, bundle, runtime)
        if ready is not None:
            say(f"{folder.name}: up to date")
            rows.append(ready)
            continue
        beside = next((out / row["engine"] for row in rows if row["engine"].startswith(f"{runtime}-")), folder)
        options = _options(bundle, runtime, beside, workspace_mib, timing_cache)
        rows.append(_build_cascade(bundle, runtime, folder, options))
    return rows


def _options(
    bundle: Bundle, runtime: str, folder: Path, workspace_mib: Optional[int], timing_cache: Optional[Path]
) -> BuildOptions:
    """Return the options of a build. Without `timing_cache`, the cache of the engine in `folder` is used, if it was built here."""
    if not _has_timing_cache(runtime):
        return {}
    last = folder / TIMING_CACHE
    ours = last.is_file() and trusted(bundle, folder)
    return {"workspace_mib": workspace_mib, "timing_cache": timing_cache or (last if ours else None)}


def _for_cascade(bundle: Bundle, runtimes: Sequence[str], precisions: Optional[Sequence[str]]) -> List[str]:
    """Return the runtimes that the bundle's cascade is built for: those that take the ONNX files of both models.

    Empty: the bundle has no cascade, or one of its models has another precision than `precisions` (None: any).

    Raises:
        EngineError: there is a cascade, but none of the runtimes takes both files.
    """
    found = bundle.cascade
    if found is None:
        return []
    if precisions is not None and not set(found.precisions) <= set(precisions):
        say(f"cascade: not built, because its models are {' and '.join(found.precisions)}")
        return []
    misfits = {runtime: found.misfit(runtime) for runtime in runtimes}
    if all(misfits.values()):
        reasons = ", ".join(f"{file} is not for {runtime}" for runtime, file in misfits.items())
        raise EngineError(
            f"{bundle.directory}: its cascade cannot be built here: {reasons}; fit `yolo-compress cascade` to the files for this "
            "runtime and make the bundle again, or choose another --runtime"
        )
    return [runtime for runtime, file in misfits.items() if file is None]


def _build(
    bundle: Bundle, stems: Sequence[str], runtime: str, precision: str, folder: Path, options: BuildOptions
) -> Built:
    """Build the engine in a temporary folder beside `folder`, then replace `folder`."""
    files = {bundle.directory / bundle.onnx[stem]: stem for stem in stems}
    for onnx, stem in files.items():
        if sha256_file(onnx) != bundle.onnx_sha256(stem):
            raise BundleRefused(f"{onnx}: changed while in use; refused, copy the bundle again")
    before, start = jetson.state(), time.time()

    def wrong(engine: Backend, info: EngineInfo) -> Optional[str]:
        return golden.check(bundle.directory, engine, info)["reason"]

    with _replacing(folder) as partial:
        if len(files) > 1:
            onnx = build_suited(runtime, list(files), partial, wrong, bundle.names, bundle.imgsz)
        else:
            BACKENDS[runtime].build(onnx, partial, precision, bundle.names, bundle.imgsz, **options)
        stem = files[onnx]
        info = load_info(partial, bundle.onnx_sha256(stem))
        if info.tried:
            say(f"{folder.name}: built from {choice(onnx.name, info.tried)}")
        made = _recorded(bundle, partial, folder.name, bundle.onnx[stem], info, options, before, start)
        built_here.record(partial, needed=not trusted(bundle, partial))
    return made


def _build_cascade(bundle: Bundle, runtime: str, folder: Path, options: BuildOptions) -> Built:
    """Build both engines of the bundle's cascade in a temporary folder beside `folder`, then replace `folder`."""
    cascade = bundle.cascade
    assert cascade is not None, "the bundle has no cascade"
    onnx = " then ".join(cascade.onnx)
    say(f"{folder.name}: building from {onnx}")
    before, start = jetson.state(), time.time()
    with _replacing(folder) as partial:
        policy, files = cascade.directory / POLICY, [bundle.directory / file for file in cascade.onnx]
        build_cascade(policy, files, runtime, partial, **options)
        (small, small_info), (large, large_info) = engines(partial)[1]
        info = joined(small_info, large_info)
        made = _recorded(bundle, partial, folder.name, onnx, info, options, before, start)
        for engine in (small, large):
            built_here.record(engine, needed=not trusted(bundle, engine))
    return made


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Make an empty folder beside `folder`. At the end of the `with` block it replaces `folder`. After an error it is deleted."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for left in (partial, old):
        shutil.rmtree(str(left), ignore_errors=True)
    try:
        os.makedirs(str(partial))  # fail now if the folder cannot be written, not after an hour of building
        with naming(partial):
            yield partial
    except BaseException:
        shutil.rmtree(str(partial), ignore_errors=True)  # an unfinished engine is of no use
        raise
    if folder.exists():
        os.replace(str(folder), str(old))
    os.replace(str(partial), str(folder))
    shutil.rmtree(str(old), ignore_errors=True)


def _recorded(
    bundle: Bundle,
    partial: Path,
    name: str,
    onnx: str,
    info: EngineInfo,
    options: BuildOptions,
    before: jetson.JetsonState,
    start: float,
) -> Built:
    """Write `build.json`, and return the row of an engine.

    Args:
        partial: folder of the engine.
        name: final name of the folder.
        onnx: ONNX file in the bundle. Of a cascade: both.
        before: state of the device before the build, which began at `start`.
    """
    made: Built = {
        "engine": name,
        "onnx": onnx,
        "library": info.library,
        "seconds": round(time.time() - start, 1),
    }
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    document = dict(
        made, schema=1, bundle=bundle.about(), runtime=info.runtime, precision=info.precision,
        onnx_sha256=info.onnx_sha256, options=given, device=before, clocks_after=jetson.clocks(), at=round(start),
    )  # fmt: skip
    written(partial / BUILT, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("utf-8"))
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


def _cascade_up_to_date(folder: Path, bundle: Bundle, runtime: str) -> Optional[Built]:
    """Return the row of a cascade that is up to date. None: it is not.

    A cascade is up to date if it has the policy of the bundle, and both engines are as `_up_to_date` requires it of an engine.
    """
    cascade = bundle.cascade
    assert cascade is not None, "the bundle has no cascade"
    try:
        found = engines(folder)[1] if cascade.made(folder) else []
        library = json_text.read(folder / BUILT)["library"]
    except (EngineError, OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged
    if not found or not all(
        info.runtime == runtime
        and trusted(bundle, engine)
        and library == info.library == library_version(runtime)
        and not (registry.RUNTIMES[runtime].gpu and built_elsewhere(info) is not None)
        for engine, info in found
    ):
        return None
    return {"engine": folder.name, "onnx": " then ".join(cascade.onnx), "library": str(library), "seconds": None}


def library_version(runtime: str) -> str:
    """Return the version of the installed engine library. The runtime's `probe` must have imported it."""
    return str(sys.modules[registry.RUNTIMES[runtime].module or runtime].__version__)
