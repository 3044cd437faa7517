"""What the bundle's commands share: a bundle is verified before anything else, and an error is one line and an exit code."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from .errors import EngineError, RuntimeFailure, RuntimeUnavailable, SourceError
from .sealed import MADE_HERE, MANIFEST, BundleRefused, pinned_key, verify

HERE = Path(__file__).resolve().parents[1]  # the bundle that this file was copied into
ENGINES = "engines"
STORAGE, INTERRUPTED = 6, 130  # exit codes


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        onnx: stem ("fp32", "int8-openvino") -> file below `directory`.
        imgsz: height and width of the input, px.
    """

    directory: Path
    manifest: Dict[str, Any]
    name: str
    version: int
    names: Tuple[str, ...]
    imgsz: Tuple[int, int]
    onnx: Dict[str, str]

    def form(self, runtime: str, precision: str) -> Optional[str]:
        """Stem of the ONNX that suits the runtime as it is installed here."""
        from .engine import onnx_form

        return onnx_form(self.onnx, runtime, precision)

    def onnx_sha256(self, stem: str) -> str:
        """What the manifest vouches for."""
        return str(self.manifest["files"][self.onnx[stem]]["sha256"])

    @property
    def precisions(self) -> Tuple[str, ...]:
        """Those that the bundle has files of."""
        return tuple(p for p in ("fp32", "fp16", "int8") if any(stem.split("-")[0] == p for stem in self.onnx))

    def about(self) -> Dict[str, Any]:
        """Which bundle a result is of."""
        digest = hashlib.sha256((self.directory / MANIFEST).read_bytes()).hexdigest()
        return {"name": self.name, "version": self.version, "manifest_sha256": digest}


def opened(directory: Path) -> Bundle:
    """Verify the bundle, with this machine's pinned key where there is one, and read its manifest.

    Raises:
        BundleRefused: see `sealed.verify`; or the manifest does not say what the commands need.
    """
    manifest = verify(directory, pinned_key())
    try:
        height, width = (int(side) for side in manifest["imgsz"])
        onnx = {str(stem): str(file) for stem, file in manifest["onnx"].items()}
        strangers = [file for file in onnx.values() if file not in manifest["files"]]
        names = tuple(str(name) for name in manifest["names"])
        found = Bundle(directory, manifest, str(manifest["name"]), manifest["version"], names, (height, width), onnx)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleRefused(f"{directory / MANIFEST}: does not describe a bundle ({error!r}); make it again") from error
    if not isinstance(manifest.get("gate", {}), dict) or not isinstance(manifest.get("val", {}), dict):
        raise BundleRefused(f"{directory / MANIFEST}: its gate or val is no mapping; make it again")
    if strangers:
        raise BundleRefused(f"{directory / MANIFEST}: names {strangers[0]!r}, which it does not vouch for; refused")
    return found


def outside(bundle: Bundle, path: Optional[Path]) -> None:
    """Refuse to write where a new file would be one that the manifest does not list.

    Raises:
        SourceError: the path lies in the bundle, and is none of what its commands make there.
    """
    if path is None:
        return
    root, asked = bundle.directory.resolve(), Path(os.path.realpath(str(path)))
    if root in (asked,) + tuple(asked.parents) and asked.relative_to(root).parts[:1] not in [(n,) for n in MADE_HERE]:
        raise SourceError(
            f"{path}: in the bundle, which takes no file that its manifest does not list; write elsewhere"
        )


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def engine_folder(bundle: Bundle, engine: Optional[str] = None) -> Path:
    """The engine of that name in `engines/` (`tensorrt-int8`) or at that path; by default the first in the order of `PREFERENCE`.

    Raises:
        RuntimeUnavailable: none was built, or not that one.
        EngineError: it is altered, or of another bundle.
    """
    folder = bundle.directory / ENGINES
    if engine is not None and os.sep in engine:
        return _of_bundle(bundle, Path(engine))
    built = built_engines(folder)
    if engine is not None and engine not in built:
        there = f"there are {', '.join(built)}" if built else "there are none"
        raise RuntimeUnavailable(f"{folder}: no engine {engine!r}, {there}", "run python3 build.py first")
    if not built:
        raise RuntimeUnavailable(f"{folder}: no engine", "run python3 build.py first")
    return _of_bundle(bundle, folder / (engine or min(built, key=_rank)))


def built_engines(folder: Path) -> List[str]:
    """Names of the engines that build.py left in a folder."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in folder.iterdir() if (entry / "engine.json").is_file())
    return [name for name in names if not name.endswith((".partial", ".old"))]


def _of_bundle(bundle: Bundle, chosen: Path) -> Path:
    """The folder, if its engine is whole and comes from an ONNX of this bundle."""
    from .backend import load_info

    origin = load_info(chosen).onnx_sha256
    if origin not in (bundle.onnx_sha256(stem) for stem in bundle.onnx):
        raise EngineError(f"{chosen}: built from ONNX {origin[:16]}, which is not of this bundle; run python3 build.py")
    return chosen


PREFERENCE = (
    ("tensorrt", "openvino", "onnxruntime"),
    ("int8", "fp16", "fp32"),
)  # the quicker first, as measured by bench.py


def _rank(name: str) -> Tuple[int, int, str]:
    runtime, _, precision = name.partition("-")
    places = [list(order).index(word) if word in order else 9 for word, order in zip((runtime, precision), PREFERENCE)]
    return places[0], places[1], name


def guarded(action: Callable[[], int]) -> int:
    """Exit code of a command: its own, or that of the error it ends with, which is said on stderr in one line."""
    try:
        return action()
    except RuntimeFailure as error:
        say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        say(f"error: {error.filename or 'file system'}: {error.strerror or error}")
        return STORAGE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def say(text: str) -> None:
    """To stderr; stdout holds the answer."""
    print(text, file=sys.stderr, flush=True)
