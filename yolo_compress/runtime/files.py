"""What a manifest says of a file: enough to tell whether it is the one that was written."""

from __future__ import annotations

from typing import TypedDict


class FileEntry(TypedDict):
    """Of one file. The manifest maps its name, relative and with `/`, to this."""

    sha256: str  # hex
    size: int  # bytes
