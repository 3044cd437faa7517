"""From a `.partial` to an artefact: the steps of a publication, each of which a kill may be the last.

Seal the payload (hash, fsync), write the manifest into the `.partial`, remove `work`, rename. The manifest is the commit: a kill
before it leaves `work` to resume from; after it, `complete` does the rest.
"""

import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from yolo_compress.errors import CorruptArtifact
from yolo_compress.files.atomic import (
    crash_point,
    fsync_directory,
    fsync_file,
    is_temporary,
    replace,
    storage_errors,
)
from yolo_compress.files.lock import lock
from yolo_compress.runtime.files import FileEntry
from yolo_compress.store.entries import delete, entry_of, partial_of, to_trash
from yolo_compress.store.manifest import (
    BEGUN,
    MANIFEST,
    WORK,
    payload,
    read_artifact,
    sha256_file,
    verify_payload,
)


def complete(directory: Path) -> None:
    """Finish a publication that was killed after its manifest; drop a manifest that later writes made untrue.

    Raises:
        StorageError: The file system refuses.
    """
    partial, entry = partial_of(directory), entry_of(directory)
    with storage_errors(directory, "publish"):
        if entry is None or not (partial / MANIFEST).is_file():
            return
        with publishing(directory.parent, entry.stage):
            if not (partial / MANIFEST).is_file():  # somebody else has finished it meanwhile
                return
            try:
                artifact = read_artifact(partial, entry.stage)
                verify_payload(artifact, set(payload(partial, without_work=True)))
                if artifact.fingerprint[:16] != entry.short:
                    raise CorruptArtifact(f"{partial}: the manifest is that of another")
            except CorruptArtifact:
                (partial / MANIFEST).unlink(missing_ok=True)
            else:
                commit(partial, directory)


def publishing(folder: Path, stage: str) -> AbstractContextManager[None]:
    """The lock of a publication. Not the lock of a run, which is held for hours: readers take this one for `complete`."""
    return lock(folder / ".publishing", f"publishing {stage}")


def seal(partial: Path) -> dict[str, FileEntry]:
    """Bring the payload to the disk, without what killed calls left in it.

    Returns:
        The manifest's entry of each file.

    Raises:
        ValueError: A link or another thing that is no plain file is among the payload.
    """
    _sweep(partial)
    files = {name: _seal(partial / name) for name in payload(partial, without_work=True)}
    for folder in {(partial / name).parent for name in files} - {partial}:
        fsync_directory(folder)
    return files


def _sweep(partial: Path) -> None:
    """Remove what a killed atomic write or a killed publication left among the payload."""
    (partial / MANIFEST).unlink(missing_ok=True)
    for name in list(payload(partial, without_work=True)):
        if is_temporary(Path(name).name):
            (partial / name).unlink()


def _seal(path: Path) -> FileEntry:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is no regular file and cannot be published")
    entry = FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
    fsync_file(path)
    return entry


def commit(partial: Path, directory: Path) -> None:
    """Drop the work folder and rename: the payload is on the disk, and its manifest too.

    A directory cannot be renamed over one that has files. So the artefact that is there moves aside first; a kill between
    the two renames leaves the committed `.partial`, which `complete` finishes.
    """
    crash_point("before removal of work")
    if (partial / WORK).is_dir():
        shutil.rmtree(partial / WORK)
    (partial / BEGUN).unlink(missing_ok=True)
    crash_point("after removal of work")
    trash = to_trash(directory) if os.path.lexists(directory) else None
    replace(partial, directory)
    if trash is not None:
        delete(trash)
