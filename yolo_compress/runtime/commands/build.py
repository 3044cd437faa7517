"""`python3 build.py`: builds this robot's engines from the bundle's ONNX files, and writes down on what they were built.

TensorRT where it works; without it ONNX Runtime and OpenVINO, but not on a Jetson, whose GPU would lie idle without a word.
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
from ..backends.base import PRECISIONS, load_info, sha256_file
from ..backends.tensorrt.build import TIMING_CACHE
from ..backends.tensorrt.run import built_elsewhere
from ..engine import BACKENDS
from ..errors import EngineError, RuntimeUnavailable, naming
from ..measure import jetson
from ..secure import built_here
from ..secure.seal import BundleRefused, written
from .common import ENGINES, HERE, Bundle, Parser, answer, guarded, opened, outside, positive, say, trusted

BUILT = "build.json"


class BuildOptions(TypedDict, total=False):
    """What `--workspace-mib` and `--timing-cache` ask of TensorRT; None: nothing."""

    workspace_mib: Optional[int]
    timing_cache: Optional[Path]


class _Made(TypedDict):
    library: str  # version
    seconds: Optional[float]  # that it took; null where it was up to date


class Built(_Made):
    """An engine, as `build.py` prints it."""

    engine: str  # name of its folder
    onnx: str  # file in the bundle


def main(argv: Optional[Sequence[str]] = None, directory: Path = HERE) -> int:
    """Build, say what was built as one JSON line on stdout, and return the exit code."""
    parser = Parser(prog="build.py", description=__doc__)
    parser.add_argument("--runtime", choices=sorted(BACKENDS), action="append", help="default: what works here")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="default: all of the bundle")
    parser.add_argument("--workspace-mib", type=positive, help="TensorRT's limit of scratch memory")
    parser.add_argument(
        "--timing-cache", type=Path, help="of an earlier build on this device (default: its own last one)"
    )
    parser.add_argument("--out", type=Path, help=f"folder of the engines (default: {ENGINES} in the bundle)")
    parser.add_argument("--force", action="store_true", help="build anew what is up to date")
    options = parser.parse_args(argv)

    def action() -> int:
        bundle = opened(directory)
        rows = build(
            bundle,
            outside(bundle, options.out or directory / ENGINES, "--out"),
            choose_runtimes(options.runtime),
            options.precision or bundle.precisions,
            workspace_mib=options.workspace_mib,
            timing_cache=options.timing_cache,
            force=options.force,
        )
        answer(json.dumps({"bundle": bundle.about(), "engines": rows}))
        return 0

    return guarded(action)


def choose_runtimes(asked: Optional[Sequence[str]]) -> List[str]:
    """What was asked for, else the runtime of the GPU, else the runtimes of the CPU.

    Raises:
        RuntimeUnavailable: one that was asked for does not work here, a Jetson's GPU has none, or none works.
    """
    wanted = list(dict.fromkeys(asked or BACKENDS))
    missing = {name: problem for name in wanted for problem in [BACKENDS[name].probe()] if problem is not None}
    if asked:
        if missing:
            raise RuntimeUnavailable("; ".join(missing.values()), "or ask for another --runtime")
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
    force: bool = False,
) -> List[Built]:
    """One folder a runtime and precision in `out`; an engine that is up to date stays unless `force`.

    Raises:
        EngineError: the bundle has no file of a precision, or a library refuses it.
        BundleRefused: an ONNX file changed after the bundle was verified.
    """
    if (workspace_mib is not None or timing_cache is not None) and not all(
        _has_timing_cache(runtime) for runtime in runtimes
    ):
        raise EngineError(f"--workspace-mib and --timing-cache are TensorRT's; {', '.join(runtimes)} asked for")
    force = (
        force or workspace_mib is not None or timing_cache is not None
    )  # what is there may have been built without them
    rows: List[Built] = []
    for runtime in runtimes:
        for precision in dict.fromkeys(precisions):
            stem = bundle.form(runtime, precision)
            if stem is None:
                raise EngineError(
                    f"{bundle.directory}: no {precision} ONNX for {runtime}; it has {sorted(bundle.onnx)}"
                )
            folder = out / f"{runtime}-{precision}"
            library = None if force else _up_to_date(folder, bundle, stem, runtime)
            if library is not None:
                say(f"{folder.name}: up to date")
                rows.append({"engine": folder.name, "onnx": bundle.onnx[stem], "library": library, "seconds": None})
                continue
            say(f"{folder.name}: building from {bundle.onnx[stem]}")
            options: BuildOptions = {}
            if _has_timing_cache(runtime):
                last = folder / TIMING_CACHE
                ours = last.is_file() and trusted(bundle, folder)
                options = {"workspace_mib": workspace_mib, "timing_cache": timing_cache or (last if ours else None)}
            made = _build(bundle, stem, runtime, precision, folder, options)
            rows.append({"engine": folder.name, "onnx": bundle.onnx[stem], **made})
    return rows


def _build(bundle: Bundle, stem: str, runtime: str, precision: str, folder: Path, options: BuildOptions) -> _Made:
    """Build beside, then take the place of what was there."""
    onnx = bundle.directory / bundle.onnx[stem]
    if sha256_file(onnx) != bundle.onnx_sha256(stem):
        raise BundleRefused(f"{onnx}: changed while in use; refused, copy the bundle again")
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for left in (partial, old):
        shutil.rmtree(str(left), ignore_errors=True)
    before, start = jetson.state(), time.time()
    try:
        os.makedirs(str(partial))  # a folder that cannot be written is an error now, not after an hour of building
        with naming(partial):
            BACKENDS[runtime].build(onnx, partial, precision, bundle.names, bundle.imgsz, **options)
            info = load_info(partial, bundle.onnx_sha256(stem))
            made: _Made = {"library": info.library, "seconds": round(time.time() - start, 1)}
            given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
            document = dict(
                made, schema=1, bundle=bundle.about(), runtime=runtime, precision=precision, onnx=bundle.onnx[stem],
                onnx_sha256=info.onnx_sha256, options=given, device=before, clocks_after=jetson.clocks(), at=round(start),
            )  # fmt: skip
            written(partial / BUILT, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("utf-8"))
        built_here.record(partial, needed=not trusted(bundle, partial))
    except BaseException:
        shutil.rmtree(str(partial), ignore_errors=True)  # half an engine only takes room
        raise
    if folder.exists():
        os.replace(str(folder), str(old))
    os.replace(str(partial), str(folder))
    shutil.rmtree(str(old), ignore_errors=True)
    return made


def _has_timing_cache(runtime: str) -> bool:
    return "timing_cache" in registry.RUNTIMES[runtime].build_options


def _up_to_date(folder: Path, bundle: Bundle, stem: str, runtime: str) -> Optional[str]:
    """The library's version of a whole engine of this ONNX by the library that is installed here, else None."""
    try:
        info = load_info(folder, bundle.onnx_sha256(stem))
        library = json_text.read(folder / BUILT)["library"]
    except (EngineError, OSError, ValueError, KeyError, TypeError):
        return None  # absent, damaged, or of another ONNX: built anew
    if registry.RUNTIMES[runtime].gpu and built_elsewhere(info) is not None:
        return None  # the robot's disk came from another
    if not trusted(bundle, folder):
        return None  # it came with the bundle
    return str(library) if library == info.library == library_version(runtime) else None


def library_version(runtime: str) -> str:
    """Version of the engine library as it is installed here; the runtime works."""
    return str(sys.modules[runtime].__version__)  # imported by its `probe`
