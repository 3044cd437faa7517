"""Keys for the signature of a bundle. The private key (seed) stays on the user's machine. A robot trusts the public key."""

from __future__ import annotations

import os
import secrets
import shlex
import stat
from pathlib import Path
from typing import TypedDict

from yolo_compress.errors import RecipeError
from yolo_compress.files.atomic import atomic_write, fsync_directory, storage_errors
from yolo_compress.progress import notice
from yolo_compress.runtime.secure import ed25519
from yolo_compress.runtime.secure.signed_manifest import KEY_BYTES, KEY_FILE, key_of

PREFIX = "seed:"  # marks the private key, since both keys are 32 bytes


class Keys(TypedDict):
    """The JSON document that `yolo-compress keygen` prints: the files of the two keys."""

    key: str  # file of the private key, which stays on this machine
    public_key: str  # file of the public key
    pin_as: str  # path on a robot where the public key must be


def keygen(out: Path) -> Keys:
    """Write a new private key to `out`, readable by its owner only, and the public key to `out`.pub.

    If an earlier call was killed after it wrote the private key, this call writes the missing public key.

    Raises:
        RecipeError: The public key exists already. Or `out` is a folder, or a file that holds no private key.
        StorageError: A file cannot be written.
    """
    if not out.name:
        raise RecipeError(f"out={out}: is a folder; give the name of a file in it")
    public_file = out.with_name(out.name + ".pub")
    if public_file.exists():
        raise RecipeError(
            f"{public_file}: exists already; a new key locks out the robots that pinned the old one, so give another name"
        )
    if not out.exists():
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _write_seed(out, secrets.token_bytes(KEY_BYTES))
    try:
        seed = read_seed(out)
    except RecipeError as error:
        raise RecipeError(f"{out}: exists already and is no private key; delete it, or give another name") from error
    atomic_write(public_file, ed25519.public_key(seed).hex() + "\n")
    return {"key": str(out), "public_key": str(public_file), "pin_as": KEY_FILE}


def _write_seed(out: Path, seed: bytes) -> None:
    """Write the private key to the disk. If that fails, no file is left.

    Raises:
        FileExistsError: `out` exists. A key is never replaced.
    """
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(PREFIX + seed.hex() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        fsync_directory(out.parent)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def read_seed(path: Path) -> bytes:
    """Return the 32 bytes of a private key that `keygen` wrote. Warn if other users have access to the file.

    Raises:
        RecipeError: The file does not exist, or is not a private key.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
        if not text.startswith(PREFIX):
            raise ValueError("no private key (a public key cannot sign)")
        seed = key_of(text[len(PREFIX) :])
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise RecipeError(f"key={path}: {error.strerror}; make one with yolo-compress keygen out={path}") from error
    except ValueError as error:
        raise RecipeError(f"key={path}: {error}; make one with yolo-compress keygen out=FILE") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        notice(
            f"{path}: other users have access to this private key (mode {mode:o}) and can sign bundles with it; "
            f"run chmod 600 {shlex.quote(str(path))}"
        )
    return seed
