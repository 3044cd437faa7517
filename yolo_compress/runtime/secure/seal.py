"""The seal of a bundle: `manifest.json` vouches for every file, `manifest.sig` for the manifest (Ed25519, by ed25519.py).

`verify` comes before everything else that a robot does with a bundle: it reads bytes, hashes them and parses JSON; it hands
nothing to an engine library and follows no link. It cannot vouch for the code that calls it: who can alter a bundle in place can
alter its launchers, so a robot that must not trust the carrier lets the installed `switch.py` look at what arrives.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, TypedDict, cast

from .. import json_text
from ..errors import EngineError, naming
from ..files import FileEntry

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
SCHEMA = 1
MADE_HERE = (
    "engines",
    "device.json",
    "device.json.partial",
)  # what the robot's own commands write at the root; not vouched for
KEY_VARIABLE = "YOLO_COMPRESS_KEY"
KEY_FILE = "/etc/yolo_compress/bundle.pub"
KEY_BYTES, SIGNATURE_BYTES = 32, 64
MAX_MANIFEST_BYTES = 8 << 20  # 50,000 files; a larger one is no manifest
_HEX = re.compile(r"[0-9a-f]{64}")


class Validation(TypedDict, total=False):
    """The validation images of the workstation."""

    digest: str  # of the workstation's own record of them
    content: str  # as `measure.groundtruth.image_set` gives it, from the images and their boxes
    images: int


class GoldenAbout(TypedDict):
    """The golden images, in short; golden.json holds the rest."""

    images: int
    boxes: int
    conf: float
    tolerances: Mapping[str, object]  # precision -> `measure.golden.Tolerance`


class About(TypedDict, total=False):
    """What a bundle is, as `yolo-compress bundle` says it. `commands.common.opened` checks what the commands read of it."""

    name: str  # of the recipe
    target: str  # what it is configured for: "plain", "triton", ...
    names: List[str]  # class names in the order of their index
    imgsz: List[int]  # [height, width] of the input, px
    max_det: int  # detections of an image that NMS keeps
    onnx: Dict[str, str]  # stem ("int8-openvino") -> file
    gate: Mapping[str, object]  # of the report, and `forced`: whether the bundle was made although it failed
    golden: GoldenAbout
    val: Validation
    made_with: Mapping[str, object]  # commit, Python and package versions of the workstation
    recipe_fingerprint: Optional[str]  # of the report's artefact


class Versioned(About):
    """A bundle that is being made."""

    version: int  # rises from bundle to bundle


class Manifest(Versioned):
    """manifest.json. `verify` checks `version` and these two."""

    schema: int
    files: Dict[str, FileEntry]  # name, relative and with `/` ->


class BundleRefused(EngineError):
    """A bundle that is damaged, altered, older than allowed, or not signed by the pinned key."""


def seal(directory: "str | os.PathLike[str]", about: About, version: int, seed: Optional[bytes]) -> Manifest:
    """Hash every file below `directory`, write the manifest last, and sign it where there is a seed.

    Args:
        directory: of the bundle, complete but for manifest and signature.
        about: what else the manifest says.
        version: rises from bundle to bundle; a robot can refuse an older one.
        seed: 32 bytes of the private key; None leaves the bundle unsigned.

    Returns:
        The manifest.

    Raises:
        BundleRefused: a link or another thing that is no plain file lies in the folder, or a name that `verify` would refuse.
    """
    root = Path(directory)
    files: Dict[str, FileEntry] = {}
    for name in _listed(root):
        _check_name(name, root / MANIFEST)
        size, digest = _hashed(root / name)
        files[name] = {"sha256": digest, "size": size}
    manifest: Manifest = {**about, "schema": SCHEMA, "version": int(version), "files": files}
    content = (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
    _formed(content, root / MANIFEST)
    written(root / MANIFEST, content)
    if seed is None:
        if (root / SIGNATURE).exists():
            (root / SIGNATURE).unlink()
    else:
        from .ed25519 import sign

        written(root / SIGNATURE, sign(seed, content).hex().encode("ascii") + b"\n")
    return manifest


def verify(
    directory: "str | os.PathLike[str]", public_key: Optional[bytes] = None, at_least: Optional[int] = None
) -> Manifest:
    """Compare every byte below `directory` with the manifest, and the manifest with its signature.

    Args:
        directory: of the bundle. It may be reached by a link; nothing in it may be one.
        public_key: 32 bytes; the bundle has to be signed with its private half. See `pinned_key`.
        at_least: the bundle's version must not be below this.

    Returns:
        The manifest.

    Raises:
        BundleRefused: says which file, and why.
    """
    root = Path(directory)
    content = _read(root / MANIFEST, MAX_MANIFEST_BYTES, "no bundle, or one that was not copied whole")
    if public_key is not None:
        _check_signature(root, content, public_key)
    manifest = _formed(content, root / MANIFEST)
    if at_least is not None and manifest["version"] < at_least:
        raise BundleRefused(f"{root}: version {manifest['version']}, but {at_least} ran on this robot already; refused")
    vouched = manifest["files"]
    there = set(_listed(root))
    missing, extra = sorted(set(vouched) - there), sorted(there - set(vouched))
    if missing:
        raise BundleRefused(f"{root / missing[0]}: missing{_more(missing)}; copy the bundle again")
    if extra:
        raise BundleRefused(f"{root / extra[0]}: not in {MANIFEST}{_more(extra)}; delete it or copy the bundle again")
    for name in sorted(vouched):
        _check_file(root / name, vouched[name])
    return manifest


def pinned_key() -> Optional[bytes]:
    """The public key that this machine trusts alone: the file $YOLO_COMPRESS_KEY, else /etc/yolo_compress/bundle.pub.

    Returns:
        32 bytes, or None where no key is pinned.

    Raises:
        BundleRefused: a file is named or there, and holds no key: that must not read as "no key".
    """
    named = os.environ.get(KEY_VARIABLE)
    path = Path(named or KEY_FILE)
    if not named:
        try:
            os.lstat(str(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            pass  # there, perhaps, but out of reach: said below
    try:
        return key_of(path.read_text(encoding="ascii"))
    except OSError as error:
        raise BundleRefused(f"{path}: {error.strerror}; it is this machine's pinned key (${KEY_VARIABLE})") from error
    except ValueError as error:
        raise BundleRefused(f"{path}: {error}; write it with yolo-compress keygen") from error


def key_of(text: str) -> bytes:
    """32 bytes of a key written as hex or base64.

    Raises:
        ValueError: neither.
    """
    word = text.strip()
    try:
        key = bytes.fromhex(word) if _HEX.fullmatch(word.lower()) else base64.b64decode(word, validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"no Ed25519 key: 64 hexadecimal digits, or {KEY_BYTES} bytes in base64, expected")
    return key


def _check_signature(root: Path, content: bytes, public_key: bytes) -> None:
    """Refuse what the pinned key did not sign; before a byte of the manifest is parsed."""
    from .ed25519 import verify as signed

    text = _read(root / SIGNATURE, 1024, "unsigned, and this machine has a pinned key")
    try:
        signature = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        signature = b""
    if len(signature) != SIGNATURE_BYTES:
        raise BundleRefused(f"{root / SIGNATURE}: no signature ({SIGNATURE_BYTES} bytes in hex expected); refused")
    if not signed(public_key, signature, content):
        raise BundleRefused(f"{root / MANIFEST}: not signed by the pinned key (altered, or another signer); refused")


def _formed(content: bytes, where: Path) -> Manifest:
    """The manifest, if it has the form that `seal` gives it."""
    try:
        manifest: Any = json_text.parse(
            content
        )  # a key twice is refused: two readers may not see two manifests in one file
    except ValueError as error:
        raise BundleRefused(f"{where}: damaged ({error}); copy the bundle again") from error
    if not isinstance(manifest, dict) or not _is_count(manifest.get("schema")) or manifest["schema"] != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleRefused(f"{where}: schema {found!r}, {SCHEMA} expected; it is of another version of yolo_compress")
    if not _is_count(manifest.get("version")):
        raise BundleRefused(f"{where}: version {manifest.get('version')!r}, a whole number expected")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise BundleRefused(f"{where}: lists no files; copy the bundle again")
    for name, vouched in files.items():
        _check_name(name, where)
        if (
            not isinstance(vouched, dict)
            or set(vouched) != {"sha256", "size"}
            or not _is_count(vouched["size"])
            or not isinstance(vouched["sha256"], str)
            or not _HEX.fullmatch(vouched["sha256"])
        ):
            raise BundleRefused(f"{where}: {name!r} has {str(vouched)[:100]}, its sha256 and size expected")
    return cast(Manifest, manifest)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_name(name: str, where: Path) -> None:
    """Refuse what is no plain relative path below the bundle, in the one spelling that `_listed` gives."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and "\\" not in name and ":" not in name
    if not plain or not name.isprintable():
        raise BundleRefused(f"{where}: file name {name!r} is no plain path below the bundle; refused")
    if name in (MANIFEST, SIGNATURE) or parts[0] in MADE_HERE:
        raise BundleRefused(f"{where}: {name!r} is none of the files that a manifest lists; refused")


def _listed(root: Path) -> Iterable[str]:
    """Relative names of the plain files below `root`, but for the manifest, the signature and what the robot made.

    Raises:
        BundleRefused: a link, or anything else that is neither file nor folder.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.listdir(str(root / folder)))
        except OSError as error:
            raise BundleRefused(f"{root / folder}: {error.strerror}; cannot be looked through") from error
        for entry in entries:
            name = folder + entry
            if name in (MANIFEST, SIGNATURE) or name in MADE_HERE:
                continue
            mode = os.lstat(str(root / name)).st_mode
            if stat.S_ISDIR(mode):
                waiting.append(name + "/")
            elif stat.S_ISREG(mode):
                yield name
            else:
                kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
                raise BundleRefused(f"{root / name}: {kind}, which no bundle holds; refused")


def _check_file(path: Path, vouched: FileEntry) -> None:
    size = os.lstat(str(path)).st_size
    if size != vouched["size"]:
        raise BundleRefused(f"{path}: {size} bytes, {vouched['size']} expected (truncated?); copy the bundle again")
    if _hashed(path) != (size, vouched["sha256"]):
        raise BundleRefused(f"{path}: sha256 is not the one in {MANIFEST} (altered); refused, copy the bundle again")


def _hashed(path: Path) -> Tuple[int, str]:
    """Size and sha256 of a plain file."""
    digest, size = hashlib.sha256(), 0
    try:
        with _opened(path) as stream:
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise BundleRefused(f"{path}: {error.strerror}; cannot be read") from error
    return size, digest.hexdigest()


def _read(path: Path, limit: int, absent: str) -> bytes:
    """A small file whole."""
    try:
        with _opened(path) as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise BundleRefused(f"{path}: {error.strerror} ({absent}); refused") from error
    if len(content) > limit:
        raise BundleRefused(f"{path}: over {limit} bytes; refused")
    return content


def _opened(path: Path) -> Any:
    """For reading; a link, a pipe or a device in place of the file is an OSError, and nothing waits for its other end."""
    stream = os.fdopen(os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "no plain file")
    return stream


def written(path: Path, content: bytes, synced: bool = True) -> None:
    """Write a file whole or not at all; its bytes are on the disk when this returns, if `synced`.

    Raises:
        OSError: names the file; what was there is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), open(str(partial), "wb") as stream:
            stream.write(content)
            stream.flush()
            if synced:
                os.fsync(stream.fileno())
        os.replace(str(partial), str(path))
    except OSError:
        if partial.exists():
            partial.unlink()
        raise


def _more(names: List[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
