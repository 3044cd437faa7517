"""What the bundle's commands share: a bundle is verified before anything else, and an error is one line and an exit code."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, TextIO, Tuple, TypedDict

from .. import registry
from ..errors import EngineError, RuntimeFailure, RuntimeUnavailable, printable
from ..limits import MAX_DET
from ..secure import built_here
from ..secure.seal import MADE_HERE, MANIFEST, About, BundleRefused, Manifest, pinned_key, verify
from ..secure.slots import ROOT, ROOT_VARIABLE, Slots

HERE = Path(__file__).resolve().parents[2]  # the bundle that this file was copied into
ENGINES = "engines"
STORAGE, INTERRUPTED = 6, 130  # exit codes


class BundleId(TypedDict):
    """Which bundle a result is of, and which model."""

    name: str
    version: int
    manifest_sha256: str
    recipe_fingerprint: Optional[str]
    onnx: Dict[str, str]  # stem of each ONNX file -> its SHA-256


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        onnx: stem ("fp32", "int8-openvino") -> file below `directory`.
        imgsz: height and width of the input, px.
        pinned: this machine has a pinned key, so engines that came with the bundle are refused.
    """

    directory: Path
    manifest: Manifest
    name: str
    version: int
    names: Tuple[str, ...]
    imgsz: Tuple[int, int]
    onnx: Dict[str, str]
    pinned: bool = False

    def form(self, runtime: str, precision: str) -> Optional[str]:
        """Stem of the ONNX that suits the runtime as it is installed here."""
        from ..engine import onnx_form

        return onnx_form(self.onnx, runtime, precision)

    @property
    def max_det(self) -> int:
        """Detections of an image that NMS keeps."""
        return max_det(self.manifest)

    def onnx_sha256(self, stem: str) -> str:
        """What the manifest vouches for."""
        return str(self.manifest["files"][self.onnx[stem]]["sha256"])

    @property
    def precisions(self) -> Tuple[str, ...]:
        """Those that the bundle has files of."""
        return tuple(p for p in ("fp32", "fp16", "int8") if any(stem.split("-")[0] == p for stem in self.onnx))

    def about(self) -> BundleId:
        """For a document that says what it is of."""
        return {
            "name": self.name,
            "version": self.version,
            "manifest_sha256": hashlib.sha256((self.directory / MANIFEST).read_bytes()).hexdigest(),
            "recipe_fingerprint": self.manifest.get("recipe_fingerprint"),
            "onnx": {stem: self.onnx_sha256(stem) for stem in sorted(self.onnx)},
        }


def max_det(manifest: About) -> int:
    """Detections of an image that NMS keeps; ValueError where the manifest says no such number."""
    value = manifest.get("max_det", MAX_DET)
    if type(value) is not int or value < 1:
        raise ValueError(f"max_det {value!r}")
    return value


def opened(directory: Path) -> Bundle:
    """Verify the bundle, with this machine's pinned key where there is one, and read its manifest.

    Where a key is pinned, a bundle of another product than this robot's slots, or older than what ever ran in them, is refused.
    Not in a slot: an older one there is a roll-back.

    Raises:
        BundleRefused: see `seal.verify`; or the manifest does not say what the commands need.
    """
    pinned = pinned_key()
    slots = None if pinned is None or in_slot(directory) else Slots(slots_root())
    manifest = verify(directory, pinned, None if slots is None else slots.newest())
    if slots is not None:
        slots.check_product(manifest, directory)
    try:
        height, width = manifest["imgsz"]
        if not (type(height) is type(width) is int and height > 0 and width > 0):
            raise ValueError(f"imgsz {manifest['imgsz']!r}")
        max_det(manifest)
        onnx = {str(stem): str(file) for stem, file in manifest["onnx"].items()}
        strangers = [file for file in onnx.values() if file not in manifest["files"]]
        names = manifest["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names + [manifest["name"]]):
            raise ValueError("names and name of text expected")
        "".join(names + [manifest["name"]]).encode("utf-8")  # a lone surrogate cannot be printed
        found = Bundle(
            directory,
            manifest,
            manifest["name"],
            manifest["version"],
            tuple(names),
            (height, width),
            onnx,
            pinned is not None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleRefused(f"{directory / MANIFEST}: does not describe a bundle ({error!r}); make it again") from error
    if strangers:
        raise BundleRefused(f"{directory / MANIFEST}: names {strangers[0]!r}, which it does not vouch for; refused")
    for key in ("gate", "val"):
        mapping(manifest, key, directory / MANIFEST)
    return found


def engine_folder(bundle: Bundle, engine: Optional[str] = None) -> Path:
    """The engine of that name in `engines/` (`tensorrt-int8`) or at that path; by default the first in the order of `PREFERENCE`.

    Raises:
        RuntimeUnavailable: none was built, or not that one.
        EngineError: it is altered, of another bundle, or a key is pinned and it was not built here.
    """
    folder = bundle.directory / ENGINES
    if engine is not None and os.sep in engine:
        return _of_bundle(bundle, Path(engine))
    built_here = built_engines(folder)
    if engine is not None and engine not in built_here:
        there = f"there are {', '.join(built_here)}" if built_here else "there are none"
        raise RuntimeUnavailable(f"{folder}: no engine {engine!r}, {there}", "run python3 build.py first")
    if not built_here:
        raise RuntimeUnavailable(f"{folder}: no engine", "run python3 build.py first")
    return _of_bundle(bundle, folder / (engine or min(built_here, key=_rank)))


def built_engines(folder: Path) -> List[str]:
    """Names of the engines that build.py left in a folder."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in folder.iterdir() if (entry / "engine.json").is_file())
    return [name for name in names if not name.endswith((".partial", ".old"))]


def _of_bundle(bundle: Bundle, chosen: Path) -> Path:
    """The folder, if its engine is whole and comes from an ONNX of this bundle."""
    from ..backends.base import load_info

    origin = load_info(chosen).onnx_sha256
    if origin not in (bundle.onnx_sha256(stem) for stem in bundle.onnx):
        raise EngineError(f"{chosen}: built from ONNX {origin[:16]}, which is not of this bundle; run python3 build.py")
    if not trusted(bundle, chosen):
        raise EngineError(
            f"{chosen}: not built on this machine by this user, and the pinned key signs no engines; run python3 build.py"
        )
    return chosen


def trusted(bundle: Bundle, engine: Path) -> bool:
    """Whether an engine may be opened: no key is pinned, or `build.py` made it here, in a slot or by its record."""
    return not bundle.pinned or in_slot(engine) or built_here.recorded(engine)


PREFERENCE = (tuple(reversed(registry.names())), ("int8", "fp16", "fp32"))  # the fastest first, as measured by bench.py


def _rank(name: str) -> Tuple[int, int, str]:
    runtime, _, precision = name.partition("-")
    places = [list(order).index(word) if word in order else 9 for word, order in zip((runtime, precision), PREFERENCE)]
    return places[0], places[1], name


def slots_root() -> Path:
    """Folder of this robot's slots."""
    return Path(os.environ.get(ROOT_VARIABLE) or ROOT)


def in_slot(path: Path) -> bool:
    """Whether a bundle or engine lies in the slots: `switch.py install` builds the engines there, and takes none from outside."""
    return slots_root().resolve() in path.resolve().parents


def outside(bundle: Bundle, path: Path, option: str) -> Path:
    """The path, unless what is written there would lie in the bundle, which would be refused from then on.

    Raises:
        BundleRefused: it would; `engines/` and `device.json` are no part of it.
    """
    root, target = bundle.directory.resolve(), path.resolve()
    below = target.parts[len(root.parts) :] if target.parts[: len(root.parts)] == root.parts else None
    if below is not None and below[:1] not in [(name,) for name in MADE_HERE]:
        raise BundleRefused(
            f"{option} {path}: lies in the bundle, which holds what {MANIFEST} names and no more; choose a path outside {root}"
        )
    return path


def positive(text: str) -> int:
    """Type of an option: 1 or more."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def seconds(text: str) -> float:
    """Type of an option: above 0, and finite."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def mapping(manifest: Mapping[str, object], key: str, where: Path) -> Mapping[str, object]:
    """What the manifest says under a key that may be missing.

    Raises:
        BundleRefused: it is no JSON object.
    """
    value = manifest.get(key, {})
    if not isinstance(value, dict):
        raise BundleRefused(f"{where}: {key} {value!r}, an object expected; make the bundle again")
    return value


class Parser(argparse.ArgumentParser):
    """Of a command's options: help that stdout does not take is an error too (argparse would end with 0)."""

    def print_help(self, file: Any = None) -> None:
        code = guarded(lambda: answer(self.format_help().rstrip("\n")))
        if code:
            sys.exit(code)


def guarded(action: Callable[[], Optional[int]]) -> int:
    """Exit code of a command: its own, or that of the error it ends with, which is said on stderr in one line."""
    try:
        return action() or 0
    except RuntimeFailure as error:
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # whoever read stdout has gone, as `| head` does
        return 0
    except OSError as error:
        say(f"error: {error.filename2 or error.filename or 'file system'}: {error.strerror or error}")
        return STORAGE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def answer(text: str) -> None:
    """Write a line to stdout, at once.

    Raises:
        OSError: stdout is a full disk; BrokenPipeError: nobody reads it any more.
    """
    _print(text, sys.stdout)


def say(text: str) -> None:
    """Write a line to stderr; stdout holds the answer."""
    try:
        _print(text, sys.stderr)
    except OSError:
        pass  # no place is left to say it


def _print(text: str, stream: TextIO) -> None:
    try:
        print(printable(text), file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for the rest in the buffer: a quiet exit
        raise OSError(error.errno, error.strerror, stream.name) from error
