"""The entry of a file in a manifest."""

from __future__ import annotations

from typing import TypedDict


class FileEntry(TypedDict):
    """Size and digest of one file. A manifest maps the file's relative path, with `/`, to this."""

    sha256: str  # hex
    size: int  # bytes
