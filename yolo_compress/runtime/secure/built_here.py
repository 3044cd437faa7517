"""Which engines were built here: their digests, in a file of the user, outside of every bundle.

The signature of a bundle covers no engines, since each robot builds its own. Where a key is pinned, this record tells an
engine that build.py made from one that came with the bundle.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from ..errors import naming


def record(engine: Path, needed: bool) -> None:
    """Add an engine that was built just now.

    Args:
        engine: its folder; `engine.json` vouches for the other files.
        needed: a key is pinned. Without one nothing asks for the record.

    Raises:
        OSError: it cannot be written, and is needed.
    """
    file = _file()
    try:
        with naming(file):
            if not file.is_absolute():
                raise FileNotFoundError(errno.ENOENT, "no home folder; set XDG_STATE_HOME")
            os.makedirs(str(file.parent), 0o700, exist_ok=True)
            with open(str(file), "ab") as stream:
                stream.write(b"\n" + _digest(engine).encode("ascii") + b"\n")  # after a line that was cut short, too
                stream.flush()
                os.fsync(stream.fileno())
    except OSError:
        if needed:
            raise


def recorded(engine: Path) -> bool:
    """Whether this user built the engine on this machine."""
    try:
        return _digest(engine) in _file().read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False


def _digest(engine: Path) -> str:
    return hashlib.sha256((engine / "engine.json").read_bytes()).hexdigest()


def _file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "yolo_compress" / "engines"
