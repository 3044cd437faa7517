"""Record of the engines that were built on this machine: their digests, in a file of the user, outside every bundle.

The signature of a bundle does not cover engines, because each robot builds its own engines. If a key is pinned, this record shows
whether `build.py` built an engine here, or the engine came with the bundle.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from ..errors import naming


def record(engine: Path, needed: bool) -> None:
    """Add a newly built engine to the record.

    Args:
        engine: folder of the engine. The record has the digest of its `engine.json`, which has the digests of all other files.
        needed: whether a key is pinned. If no key is pinned, the record is not used, and a failed write is ignored.

    Raises:
        OSError: the record cannot be written, and `needed` is True.
    """
    file = _file()
    try:
        with naming(file):
            if not file.is_absolute():
                raise FileNotFoundError(errno.ENOENT, "no home folder; set XDG_STATE_HOME")
            os.makedirs(str(file.parent), 0o700, exist_ok=True)
            with open(str(file), "ab") as stream:
                stream.write(
                    b"\n" + _digest(engine).encode("ascii") + b"\n"
                )  # starts a new line even after an incomplete one
                stream.flush()
                os.fsync(stream.fileno())
    except OSError:
        if needed:
            raise


def recorded(engine: Path) -> bool:
    """Return whether the record says that this user built the engine on this machine."""
    try:
        return _digest(engine) in _file().read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False


def _digest(engine: Path) -> str:
    return hashlib.sha256((engine / "engine.json").read_bytes()).hexdigest()


def _file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "yolo_compress" / "engines"
