"""What lies in `root/store`: names of artefacts and of their other states, sizes, and removal.

<stage>-<fingerprint[:16]>            the artefact
<stage>-<fingerprint[:16]>.partial    what a stage is writing, or a publication that a kill interrupted
<stage>-<fingerprint[:16]>.trash      on its way out
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from yolo_compress.files.atomic import crash_point
from yolo_compress.store.manifest import MANIFEST, WORK

FOLDER = "store"
PARTIAL, TRASH = ".partial", ".trash"
_NAME = re.compile(r"(?P<stage>[a-z0-9_]+)-(?P<short>[0-9a-f]{16})(?P<state>|\.partial|\.trash)")


class Entry(NamedTuple):
    """A path whose name is an artefact's, or that of another state of one.

    Attributes:
        short: First 16 digits of the fingerprint.
        state: "" of an artefact.
    """

    path: Path
    stage: str
    short: str
    state: Literal["", ".partial", ".trash"]


def entries(folder: Path) -> Iterator[Entry]:
    """The entries of `root/store`, sorted by name; anything of another name is passed over."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry := entry_of(path):
            yield entry


def entry_of(path: Path) -> Entry | None:
    """The entry by its name; None where the name is no entry's. The path need not exist."""
    match = _NAME.fullmatch(path.name)
    state: dict[str, Literal["", ".partial", ".trash"]] = {"": "", PARTIAL: ".partial", TRASH: ".trash"}
    return Entry(path, match["stage"], match["short"], state[match["state"]]) if match else None


def partial_of(directory: Path) -> Path:
    """Where a stage writes before its artefact is `directory`."""
    return directory.with_name(directory.name + PARTIAL)


def can_continue(partial: Path) -> bool:
    """Whether a stage can resume from a `.partial`, or only its publication is left to do."""
    return (partial / MANIFEST).is_file() or ((partial / WORK).is_dir() and any((partial / WORK).iterdir()))


def remove(path: Path) -> int:
    """Remove an entry, by a rename first, so that a kill leaves no half of an artefact under its name.

    Returns:
        Bytes that it held.
    """
    size = size_bytes(path)
    delete(to_trash(path))
    return size


def to_trash(path: Path) -> Path:
    """Rename an entry to its `.trash`, in the place of one that is there."""
    trash = path.with_name(path.name.removesuffix(PARTIAL).removesuffix(TRASH) + TRASH)
    if trash != path:
        if os.path.lexists(trash):
            delete(trash)
        os.replace(path, trash)
        crash_point(f"after renaming {path.name} to trash")
    return trash


def delete(path: Path) -> None:
    """Remove a file, a link or a whole folder."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links are not followed."""
    files = (
        [path] if path.is_symlink() or not path.is_dir() else [file for file in path.rglob("*") if not file.is_dir()]
    )
    return sum(file.lstat().st_size for file in files)
