"""Entries of `root/store`: their names, sizes and removal.

<stage>-<fingerprint[:16]>            an artefact
<stage>-<fingerprint[:16]>.partial    a folder that a stage writes, or a publication that was killed
<stage>-<fingerprint[:16]>.trash      an entry that is being removed
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
    """An artefact in `root/store`, or a `.partial` or `.trash` folder beside it. The module's docstring lists the names.

    Attributes:
        short: First 16 digits of the fingerprint.
        state: "" for an artefact, else the suffix.
    """

    path: Path
    stage: str
    short: str
    state: Literal["", ".partial", ".trash"]


def entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries of `root/store`, sorted by name. Skip files with other names."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry := entry_of(path):
            yield entry


def entry_of(path: Path) -> Entry | None:
    """Parse the name of a path, which need not exist. None: it is not the name of an entry."""
    match = _NAME.fullmatch(path.name)
    state: dict[str, Literal["", ".partial", ".trash"]] = {"": "", PARTIAL: ".partial", TRASH: ".trash"}
    return Entry(path, match["stage"], match["short"], state[match["state"]]) if match else None


def partial_of(directory: Path) -> Path:
    """Return the `.partial` folder of an artefact."""
    return directory.with_name(directory.name + PARTIAL)


def can_continue(partial: Path) -> bool:
    """Return whether work in a `.partial` folder can be reused.

    Work can be reused if the folder has files in `work`, or if it has a manifest and only has to be published.
    """
    return (partial / MANIFEST).is_file() or ((partial / WORK).is_dir() and any((partial / WORK).iterdir()))


def remove(path: Path) -> int:
    """Rename an entry to `<name>.trash`, delete it, and return its size in bytes.

    The rename comes first so that a kill cannot leave an incomplete artefact.
    """
    size = size_bytes(path)
    delete(to_trash(path))
    return size


def to_trash(path: Path) -> Path:
    """Rename the folder `<name>` or `<name>.partial` to `<name>.trash`, and return the new path.

    An existing `<name>.trash` is deleted first. A folder `<name>.trash` stays as it is.
    """
    trash = path.with_name(path.name.removesuffix(PARTIAL).removesuffix(TRASH) + TRASH)
    if trash != path:
        if os.path.lexists(trash):
            delete(trash)
        os.replace(path, trash)
        crash_point(f"after renaming {path.name} to trash")
    return trash


def delete(path: Path) -> None:
    """Delete a file, a link or a folder with its content."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes. Links are not followed."""
    files = (
        [path] if path.is_symlink() or not path.is_dir() else [file for file in path.rglob("*") if not file.is_dir()]
    )
    return sum(file.lstat().st_size for file in files)
