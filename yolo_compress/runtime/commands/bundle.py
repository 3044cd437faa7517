"""Open a bundle: verify its files, read its manifest, choose an engine, and check that the engine may be opened."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Sequence, Tuple, TypedDict

from .. import json_text, registry
from ..errors import EngineError, RuntimeUnavailable
from ..max_detections import MAX_DET
from ..secure import built_here
from ..secure.signed_manifest import MADE_HERE, MANIFEST, About, BundleRefused, Manifest, pinned_key, verify
from ..secure.slots import ROOT, ROOT_VARIABLE, Slots

if TYPE_CHECKING:
    from .bundled_cascade import BundledCascade

HERE = Path(__file__).resolve().parents[2]  # the bundle that this file was copied into
ENGINES = "engines"
MEASURED = "device.json"  # what bench.py writes
CASCADE = "cascade"  # in the name of an engine: a policy folder, as in "openvino-cascade"


class BundleId(TypedDict):
    """Identity of the bundle and the model that a result belongs to."""

    name: str
    version: int
    manifest_sha256: str
    recipe_fingerprint: Optional[str]
    onnx: Dict[str, str]  # stem of each ONNX file -> its SHA-256


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        names: class names in the order of their index.
        imgsz: height and width of the input, px.
        onnx: stem of an ONNX file ("fp32", "int8-openvino") -> path of the file below `directory`.
        pinned: whether this machine has a pinned key: the public key of the only accepted signer. If so, engines that came with the
            bundle are refused.
        cascade: the cascade of the bundle. None: it has none.
    """

    directory: Path
    manifest: Manifest
    name: str
    version: int
    names: Tuple[str, ...]
    imgsz: Tuple[int, int]
    onnx: Dict[str, str]
    pinned: bool = False
    cascade: "Optional[BundledCascade]" = None

    def forms(self, runtime: str, precision: str) -> List[str]:
        """Return the stems of the ONNX files for this precision and the installed version of this runtime, see `onnx_forms`."""
        from ..engine import onnx_forms

        return onnx_forms(self.onnx, runtime, precision)

    @property
    def max_det(self) -> int:
        """Largest number of detections per image after NMS."""
        return max_det(self.manifest)

    def onnx_sha256(self, stem: str) -> str:
        """Return the SHA-256 that the manifest lists for an ONNX file."""
        return str(self.manifest["files"][self.onnx[stem]]["sha256"])

    @property
    def precisions(self) -> Tuple[str, ...]:
        """Precisions that the bundle has ONNX files for."""
        return tuple(p for p in ("fp32", "fp16", "int8") if any(stem.split("-")[0] == p for stem in self.onnx))

    def about(self) -> BundleId:
        """Return the identity of this bundle, for a result document."""
        return {
            "name": self.name,
            "version": self.version,
            "manifest_sha256": hashlib.sha256((self.directory / MANIFEST).read_bytes()).hexdigest(),
            "recipe_fingerprint": self.manifest.get("recipe_fingerprint"),
            "onnx": {stem: self.onnx_sha256(stem) for stem in sorted(self.onnx)},
        }


def max_det(manifest: About) -> int:
    """Return the largest number of detections per image after NMS.

    Raises:
        ValueError: the manifest's value is not a whole number of 1 or more.
    """
    value = manifest.get("max_det", MAX_DET)
    if type(value) is not int or value < 1:
        raise ValueError(f"max_det {value!r}")
    return value


def open_bundle(directory: Path) -> Bundle:
    """Verify a bundle and read its manifest. If this machine has a pinned key, the signature is checked with it.

    If a key is pinned, a bundle outside the slots must have the name of the bundles in the slots. It must not be older than the
    newest version that ever ran there. A bundle in a slot may be older, after a roll-back.

    Raises:
        BundleRefused: `signed_manifest.verify` refuses the bundle, or the manifest lacks a value that the commands need.
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
        unlisted = [file for file in onnx.values() if file not in manifest["files"]]
        fastest = manifest.get("fastest", [])
        if not isinstance(fastest, list) or not all(isinstance(name, str) for name in fastest):
            raise ValueError(f"fastest {fastest!r}")
        names = manifest["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names + [manifest["name"]]):
            raise ValueError("names and name of text expected")
        "".join(names + [manifest["name"]]).encode("utf-8")  # a lone surrogate cannot be printed
        bundle = Bundle(
            directory,
            manifest,
            manifest["name"],
            manifest["version"],
            tuple(names),
            (height, width),
            onnx,
            pinned is not None,
            _cascade(directory, manifest),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleRefused(f"{directory / MANIFEST}: does not describe a bundle ({error!r}); make it again") from error
    if unlisted:
        raise BundleRefused(f"{directory / MANIFEST}: names {unlisted[0]!r}, which has no entry in `files`; refused")
    for key in ("gate", "val"):
        mapping(manifest, key, directory / MANIFEST)
    return bundle


def _cascade(directory: Path, manifest: Manifest) -> "Optional[BundledCascade]":
    if "cascade" not in manifest:
        return None
    from .bundled_cascade import read_cascade

    return read_cascade(directory, manifest)


def engine_folder(bundle: Bundle, engine: Optional[str] = None) -> Path:
    """Return the folder of an engine.

    Args:
        engine: name in `engines/` (`tensorrt-int8`), or a path. None: the fastest, see `fastest_first`.

    Raises:
        RuntimeUnavailable: no engine was built, or the named engine was not built.
        EngineError: the engine is altered, belongs to another bundle, or was not built here although a key is pinned.
    """
    folder = bundle.directory / ENGINES
    if engine is not None and os.sep in engine:
        return _of_bundle(bundle, Path(engine))
    built_here = built_engines(folder)
    if engine is not None and engine not in built_here:
        available = f"there are {', '.join(built_here)}" if built_here else "there are none"
        raise RuntimeUnavailable(f"{folder}: no engine {engine!r}, {available}", "run python3 build.py first")
    if not built_here:
        raise RuntimeUnavailable(f"{folder}: no engine", "run python3 build.py first")
    return _of_bundle(bundle, folder / (engine or fastest_first(bundle, built_here)[0]))


def fastest_first(bundle: Bundle, engines: Sequence[str]) -> List[str]:
    """Sort engines by expected latency, in any precision: the gate has judged all of them.

    Cascades come before single models, unless the self-test of `bench.py` failed here.

    Engines that `bench.py` measured here come first, by their median in device.json, if they passed the golden self-test. Then come
    those on a GPU. Then those that were measured on the machine that made the bundle, by their median there. The rest has the order
    of `PREFERENCE`.
    """
    here, there = _measured_here(bundle), bundle.manifest.get("fastest", [])

    def rank(name: str) -> Tuple[bool, int, float, Tuple[int, int, str]]:
        if here.get(name) == math.inf:  # its self-test failed
            return True, 4, 0.0, _preference(name)
        alone = not name.endswith(f"-{CASCADE}")
        row = registry.RUNTIMES.get(name.partition("-")[0])
        if name in here:
            return alone, 0, here[name], _preference(name)
        if row is not None and row.gpu:
            return alone, 1, 0.0, _preference(name)
        place = (2, float(there.index(name))) if name in there else (3, 0.0)
        return (alone, *place, _preference(name))

    return sorted(engines, key=rank)


def _measured_here(bundle: Bundle) -> Dict[str, float]:
    """Return engine -> median latency in ms, from the device.json that `bench.py` wrote into this bundle. Empty: there is none.

    Of a cascade it is the mean latency, or infinity if the self-test failed.
    """
    try:
        document = json_text.read(bundle.directory / MEASURED)
        if document["bundle"]["manifest_sha256"] != bundle.about()["manifest_sha256"]:
            return {}  # it came with an earlier bundle in this folder
        alone = {
            f"{row['runtime']}-{row['precision']}": float(row["latency_p50_ms"])
            for row in document["rows"]
            if row["status"] == "ok" and row["golden"]["passed"]
        }
        cascades = {
            f"{row['runtime']}-{CASCADE}": float(row["mean_ms"]) if row["golden"]["passed"] else math.inf
            for row in document.get("cascades", [])
        }
        return {**alone, **cascades}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not measured yet, or not a device.json


def built_engines(folder: Path) -> List[str]:
    """Return the names of the finished engines and cascades in a folder."""
    if not folder.is_dir():
        return []
    made = ("engine.json", "policy.json")  # of an engine, of a cascade
    names = sorted(entry.name for entry in folder.iterdir() if any((entry / name).is_file() for name in made))
    return [name for name in names if not name.endswith((".partial", ".old"))]


def _of_bundle(bundle: Bundle, chosen: Path) -> Path:
    """Return the folder after checking that its engine is intact, built from an ONNX file of this bundle, and trusted.

    The policy folder of a cascade is accepted if it is the cascade of this bundle. Another one is accepted if one of its two engines
    is of this bundle, it is not in `engines/`, and no key is pinned: the signature covers neither its policy nor its other engine.
    """
    from ..backends.base import is_policy, load_info

    if is_policy(chosen):
        return _cascade_of_bundle(bundle, chosen)
    origin = load_info(chosen).onnx_sha256
    if origin not in (bundle.onnx_sha256(stem) for stem in bundle.onnx):
        raise EngineError(f"{chosen}: built from ONNX {origin[:16]}, which is not of this bundle; run python3 build.py")
    _require_trusted(bundle, chosen, [chosen])
    return chosen


def _require_trusted(bundle: Bundle, chosen: Path, engines: Sequence[Path]) -> None:
    if not all(trusted(bundle, engine) for engine in engines):
        raise EngineError(
            f"{chosen}: not built on this machine by this user, and the signature does not cover engines; run python3 build.py"
        )


def _cascade_of_bundle(bundle: Bundle, chosen: Path) -> Path:
    from ..detect.cascade import engines

    if bundle.cascade is not None and bundle.cascade.made(chosen):
        _require_trusted(bundle, chosen, [folder for folder, _ in engines(chosen)[1]])
        return chosen
    if chosen.resolve().parent == (bundle.directory / ENGINES).resolve():
        raise EngineError(f"{chosen}: not the cascade of this bundle; delete this folder, then run python3 build.py")
    if bundle.pinned:
        raise EngineError(f"{chosen}: a cascade, which the pinned key does not cover; give an engine of this bundle")
    policy, found = engines(chosen)
    if not {info.onnx_sha256 for _, info in found} & {bundle.onnx_sha256(stem) for stem in bundle.onnx}:
        raise EngineError(f"{chosen}: neither engine of the cascade is built from an ONNX file of this bundle")
    if policy.names != bundle.names:
        raise EngineError(f"{chosen}: a cascade of classes {list(policy.names)}, the bundle has {list(bundle.names)}")
    return chosen


def trusted(bundle: Bundle, engine: Path) -> bool:
    """Return whether an engine may be opened.

    The result is True if no key is pinned, if the engine lies in a slot, or if `build.py` recorded the engine as built here.
    """
    return not bundle.pinned or in_slot(engine) or built_here.recorded(engine)


PREFERENCE = (tuple(reversed(registry.names())), ("int8", "fp16", "fp32"))  # the fastest first on most machines


def _preference(name: str) -> Tuple[int, int, str]:
    runtime, _, precision = name.partition("-")
    places = [list(order).index(word) if word in order else 9 for word, order in zip((runtime, precision), PREFERENCE)]
    return places[0], places[1], name


def slots_root() -> Path:
    """Return the folder of this robot's slots, the two folders for installed bundles."""
    return Path(os.environ.get(ROOT_VARIABLE) or ROOT)


def in_slot(path: Path) -> bool:
    """Return whether a bundle or engine lies in the slots. Only `switch.py install` builds engines there."""
    return slots_root().resolve() in path.resolve().parents


def outside(bundle: Bundle, path: Path, option: str) -> Path:
    """Check that a path lies outside the bundle, and return it. A bundle with an added file fails its verification.

    Args:
        option: command-line option that gave the path, for the error.

    Raises:
        BundleRefused: the path lies in the bundle, and is not `engines/` or `device.json`.
    """
    root, target = bundle.directory.resolve(), path.resolve()
    below = target.parts[len(root.parts) :] if target.parts[: len(root.parts)] == root.parts else None
    if below is not None and below[:1] not in [(name,) for name in MADE_HERE]:
        raise BundleRefused(
            f"{option} {path}: lies in the bundle, which may hold only the files in {MANIFEST}; choose a path outside {root}"
        )
    return path


def mapping(manifest: Mapping[str, object], key: str, where: Path) -> Mapping[str, object]:
    """Return the JSON object under a key of the manifest. If the key is missing, return an empty object.

    Args:
        where: path of the manifest, for the error.

    Raises:
        BundleRefused: the value is not a JSON object.
    """
    value = manifest.get(key, {})
    if not isinstance(value, dict):
        raise BundleRefused(f"{where}: {key} is {value!r}, expected a JSON object; make the bundle again")
    return value
