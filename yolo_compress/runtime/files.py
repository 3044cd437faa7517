"""Size and SHA-256 of a file, as manifests list them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypedDict


class FileEntry(TypedDict):
    """Size and digest of one file. A manifest maps the file's relative path, with `/`, to this."""

    sha256: str  # hex
    size: int  # bytes


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex. The file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
