"""Keys of a bundle's signature: a seed that stays on the workstation, and the public half that a robot pins."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from yolo_compress.atomic import atomic_write, storage_errors
from yolo_compress.errors import RecipeError
from yolo_compress.runtime import ed25519
from yolo_compress.runtime.sealed import KEY_BYTES, KEY_FILE, key_of

PREFIX = "seed:"  # so that neither half is taken for the other: both are 32 bytes


def keygen(out: Path) -> dict[str, Any]:
    """Write a new seed to `out`, readable by its owner alone, and the public key beside it.

    Raises:
        RecipeError: one of the files is there already.
        StorageError: the disk said no.
    """
    public_file = out.with_name(out.name + ".pub")
    for file in (out, public_file):
        if file.exists():
            raise RecipeError(f"{file}: is there already; a key that is replaced locks out the robots that pinned it")
    seed = secrets.token_bytes(KEY_BYTES)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(PREFIX + seed.hex() + "\n")
    atomic_write(public_file, ed25519.public_key(seed).hex() + "\n")
    return {"key": str(out), "public_key": str(public_file), "pin_as": KEY_FILE}


def read_seed(path: Path) -> bytes:
    """The 32 bytes of a file that `keygen` wrote.

    Raises:
        RecipeError: no such file, or no key in it.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
        if not text.startswith(PREFIX):
            raise ValueError("no private key (a public one signs nothing)")
        return key_of(text[len(PREFIX) :])
    except OSError as error:
        raise RecipeError(f"key={path}: {error.strerror}; make one with yolo-compress keygen out={path}") from error
    except ValueError as error:
        raise RecipeError(f"key={path}: {error}; make one with yolo-compress keygen out=FILE") from error
