"""Keys of a bundle's signature: a seed that stays on the workstation, and the public half that a robot pins."""

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
from yolo_compress.runtime.secure.seal import KEY_BYTES, KEY_FILE, key_of

PREFIX = "seed:"  # so that neither half is taken for the other: both are 32 bytes


class Keys(TypedDict):
    """What `keygen` prints."""

    key: str  # file of the private half, which stays here
    public_key: str  # file of the public half
    pin_as: str  # where a robot looks for it


def keygen(out: Path) -> Keys:
    """Write a new seed to `out`, readable by its owner alone, and the public key beside it.

    A call that was killed between the two is repeated: a seed without its public key gets it.

    Raises:
        RecipeError: the public key is there already, or `out` is a folder or holds no private key.
        StorageError: the disk said no.
    """
    if not out.name:
        raise RecipeError(f"out={out}: is a folder; give the name of a file in it")
    public_file = out.with_name(out.name + ".pub")
    if public_file.exists():
        raise RecipeError(
            f"{public_file}: is there already; a key that is replaced locks out the robots that pinned it"
        )
    if not out.exists():
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _write_seed(out, secrets.token_bytes(KEY_BYTES))
    try:
        seed = read_seed(out)
    except RecipeError as error:
        raise RecipeError(
            f"{out}: is there already and holds no private key; delete it, or give another name"
        ) from error
    atomic_write(public_file, ed25519.public_key(seed).hex() + "\n")
    return {"key": str(out), "public_key": str(public_file), "pin_as": KEY_FILE}


def _write_seed(out: Path, seed: bytes) -> None:
    """Whole and on the disk, or not there. Raises FileExistsError rather than replace a key."""
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
    """The 32 bytes of a file that `keygen` wrote; says in a line where others than its owner can read or replace it.

    Raises:
        RecipeError: no such file, or no key in it.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
        if not text.startswith(PREFIX):
            raise ValueError("no private key (a public one signs nothing)")
        seed = key_of(text[len(PREFIX) :])
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise RecipeError(f"key={path}: {error.strerror}; make one with yolo-compress keygen out={path}") from error
    except ValueError as error:
        raise RecipeError(f"key={path}: {error}; make one with yolo-compress keygen out=FILE") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        notice(
            f"{path}: others than its owner have access to this private key (mode {mode:o}), and could sign bundles with it; "
            f"chmod 600 {shlex.quote(str(path))}"
        )
    return seed
