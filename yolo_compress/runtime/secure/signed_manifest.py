"""Manifest and signature of a bundle: `manifest.json` has the SHA-256 of every file, `manifest.sig` is its Ed25519 signature.

A robot calls `verify` before any other use of a bundle. `verify` only reads and hashes files and parses JSON. It passes nothing to
an engine library and follows no link. `verify` cannot protect its caller: an attacker who can change a bundle in place can also
change its launchers. So a robot that does not trust the sender checks new bundles with the installed `switch.py`.
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
# Files and folders that the robot's own commands write into the bundle; the manifest does not list them.
MADE_HERE = ("engines", "device.json", "device.json.partial")
KEY_VARIABLE = "YOLO_COMPRESS_KEY"
KEY_FILE = "/etc/yolo_compress/bundle.pub"
KEY_BYTES, SIGNATURE_BYTES = 32, 64
MAX_MANIFEST_BYTES = 8 << 20  # enough for 50,000 files
_HEX = re.compile(r"[0-9a-f]{64}")


class Validation(TypedDict, total=False):
    """The validation images that the compressed model was evaluated on."""

    digest: str  # digest of the list of images on the machine that made the bundle
    content: str  # digest of the images and their boxes, by `measure.groundtruth.image_set`
    images: int


class GoldenAbout(TypedDict):
    """Summary of the golden images. golden.json has the details."""

    images: int
    boxes: int
    conf: float
    tolerances: Mapping[str, object]  # precision -> `measure.golden.Tolerance`


class CascadeAbout(TypedDict):
    """The cascade of a bundle, whose policy and golden images are in `cascade/`."""

    small: str  # ONNX file of the small model
    large: str
    kept: float  # share of the validation images that only the small model sees
    verdict: str  # "pass", unless the bundle was forced
    golden: GoldenAbout


class About(TypedDict, total=False):
    """Description of a bundle, written by `yolo-compress bundle`. `commands.bundle.open_bundle` checks the values that commands use."""

    name: str  # name of the recipe
    target: str  # system that the bundle is for: "plain", "triton", ...
    names: List[str]  # class names in the order of their index
    imgsz: List[int]  # [height, width] of the input, px
    max_det: int  # largest number of detections per image after NMS
    onnx: Dict[str, str]  # stem ("int8-openvino") -> file
    gate: Mapping[str, object]  # gate of the report, and `forced`: whether the bundle was made although it failed
    fastest: List[str]  # engines ("openvino-int8") by latency on the machine that made the bundle, the fastest first
    golden: GoldenAbout
    cascade: CascadeAbout  # absent if the bundle has no cascade
    val: Validation
    made_with: Mapping[str, object]  # commit, and Python and package versions on the machine that made the bundle
    recipe_fingerprint: Optional[str]  # fingerprint of the report's artefact


class Versioned(About):
    """Description of a bundle with its version."""

    version: int  # higher than that of every earlier bundle


class Manifest(Versioned):
    """The document in manifest.json. `verify` checks `version`, `schema` and `files`."""

    schema: int
    files: Dict[str, FileEntry]  # relative path with `/` -> size and SHA-256


class BundleRefused(EngineError):
    """The bundle is damaged, altered, older than allowed, or not signed by the pinned key."""


def seal(directory: "str | os.PathLike[str]", about: About, version: int, seed: Optional[bytes]) -> Manifest:
    """Hash every file of a bundle, write `manifest.json`, and sign the manifest if `seed` is not None. Return the manifest.

    Args:
        directory: folder of the bundle, complete except for manifest and signature.
        about: description of the bundle, which becomes part of the manifest.
        version: version of the bundle. It must be higher than all earlier versions, since a robot can refuse an older bundle.
        seed: private key, 32 bytes. None: do not sign.

    Returns:
        The manifest.

    Raises:
        BundleRefused: the folder holds a link or special file, or a file name that `verify` would refuse.
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
    """Check every file below `directory` against the manifest, and the manifest against its signature.

    Args:
        directory: folder of the bundle. The path may be a link, but the folder must not hold links.
        public_key: 32 bytes. The bundle must be signed with the matching private key. None: do not check the signature.
            `pinned_key` returns the key that this machine trusts.
        at_least: lowest version that is accepted. None: any version.

    Returns:
        The manifest.

    Raises:
        BundleRefused: the check failed. The message has the file and the reason.
    """
    root = Path(directory)
    content = _read(root / MANIFEST, MAX_MANIFEST_BYTES, "no bundle, or one that was not copied whole")
    if public_key is not None:
        _check_signature(root, content, public_key)
    manifest = _formed(content, root / MANIFEST)
    if at_least is not None and manifest["version"] < at_least:
        raise BundleRefused(f"{root}: version {manifest['version']}, but {at_least} ran on this robot already; refused")
    entries = manifest["files"]
    present = set(_listed(root))
    missing, extra = sorted(set(entries) - present), sorted(present - set(entries))
    if missing:
        raise BundleRefused(f"{root / missing[0]}: missing{_more(missing)}; copy the bundle again")
    if extra:
        raise BundleRefused(f"{root / extra[0]}: not in {MANIFEST}{_more(extra)}; delete it or copy the bundle again")
    for name in sorted(entries):
        _check_file(root / name, entries[name])
    return manifest


def pinned_key() -> Optional[bytes]:
    """Read the only public key that this machine trusts, from $YOLO_COMPRESS_KEY or /etc/yolo_compress/bundle.pub.

    Returns:
        32 bytes, or None if no key is pinned.

    Raises:
        BundleRefused: the file exists or the variable is set, but no key can be read. This must not count as "no key".
    """
    named = os.environ.get(KEY_VARIABLE)
    path = Path(named or KEY_FILE)
    if not named:
        try:
            os.lstat(str(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            pass  # the file may exist but be unreadable, which raises below
    try:
        return key_of(path.read_text(encoding="ascii"))
    except OSError as error:
        raise BundleRefused(f"{path}: {error.strerror}; it is this machine's pinned key (${KEY_VARIABLE})") from error
    except ValueError as error:
        raise BundleRefused(f"{path}: {error}; write it with yolo-compress keygen") from error


def key_of(text: str) -> bytes:
    """Parse a key (32 bytes) in hex or base64.

    Raises:
        ValueError: the text is not such a key.
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
    """Raise BundleRefused if the pinned key did not sign the manifest. Runs before the manifest is parsed."""
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
    """Parse the manifest and check its format."""
    try:
        # Duplicate keys are refused, because two parsers could read them differently.
        manifest: Any = json_text.parse(content)
    except ValueError as error:
        raise BundleRefused(f"{where}: damaged ({error}); copy the bundle again") from error
    if not isinstance(manifest, dict) or not _is_count(manifest.get("schema")) or manifest["schema"] != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleRefused(f"{where}: schema {found!r}, expected {SCHEMA}; it is of another version of yolo_compress")
    if not _is_count(manifest.get("version")):
        raise BundleRefused(f"{where}: version {manifest.get('version')!r}, expected a whole number")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise BundleRefused(f"{where}: lists no files; copy the bundle again")
    for name, entry in files.items():
        _check_name(name, where)
        if (
            not isinstance(entry, dict)
            or set(entry) != {"sha256", "size"}
            or not _is_count(entry["size"])
            or not isinstance(entry["sha256"], str)
            or not _HEX.fullmatch(entry["sha256"])
        ):
            raise BundleRefused(f"{where}: {name!r} has {str(entry)[:100]}, expected its sha256 and size")
    return cast(Manifest, manifest)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_name(name: str, where: Path) -> None:
    """Raise BundleRefused unless the name is a plain relative path below the bundle, in the form that `_listed` returns."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and "\\" not in name and ":" not in name
    if not plain or not name.isprintable():
        raise BundleRefused(f"{where}: file name {name!r} is no plain path below the bundle; refused")
    if name in (MANIFEST, SIGNATURE) or parts[0] in MADE_HERE:
        raise BundleRefused(f"{where}: {name!r} must not be listed in a manifest; refused")


def _listed(root: Path) -> Iterable[str]:
    """Yield the relative paths of the files below `root`, except manifest, signature and `MADE_HERE`.

    Raises:
        BundleRefused: there is a link, or something else than a file or folder.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.listdir(str(root / folder)))
        except OSError as error:
            raise BundleRefused(f"{root / folder}: {error.strerror}; the folder cannot be read") from error
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
                raise BundleRefused(f"{root / name}: {kind}, which a bundle must not hold; refused")


def _check_file(path: Path, entry: FileEntry) -> None:
    size = os.lstat(str(path)).st_size
    if size != entry["size"]:
        raise BundleRefused(f"{path}: {size} bytes, expected {entry['size']} (truncated?); copy the bundle again")
    if _hashed(path) != (size, entry["sha256"]):
        raise BundleRefused(f"{path}: sha256 is not the one in {MANIFEST} (altered); refused, copy the bundle again")


def _hashed(path: Path) -> Tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a plain file."""
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
    """Read a file of at most `limit` bytes.

    Args:
        absent: meaning of a missing file, as the end of the error message.
    """
    try:
        with _opened(path) as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise BundleRefused(f"{path}: {error.strerror} ({absent}); refused") from error
    if len(content) > limit:
        raise BundleRefused(f"{path}: over {limit} bytes; refused")
    return content


def _opened(path: Path) -> Any:
    """Open a plain file for reading. A link, a pipe or a device raises OSError, without waiting for the pipe's other end."""
    stream = os.fdopen(os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "no plain file")
    return stream


def written(path: Path, content: bytes, synced: bool = True) -> None:
    """Write a file atomically.

    Args:
        synced: sync the bytes to the disk before returning.

    Raises:
        OSError: the file cannot be written. An earlier file of this name is unchanged.
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
