"""Publish the output folder of a stage, its `.partial`, as an artefact. The process may be killed after any step.

The steps: hash and fsync the files, write the manifest into the `.partial`, remove `work`, rename the folder. If the process is
killed before the manifest is written, the stage resumes from `work`. After a later kill, `complete` does the remaining steps.
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
from yolo_compress.runtime.files import FileEntry, sha256_file
from yolo_compress.store.entries import delete, entry_of, partial_of, to_trash
from yolo_compress.store.manifest import BEGUN, MANIFEST, WORK, payload, read_artifact, verify_payload


def complete(directory: Path) -> None:
    """Finish a publication that was killed after its manifest was written. If the files differ from the manifest, delete the manifest.

    Raises:
        StorageError: A file cannot be read or written.
    """
    partial, entry = partial_of(directory), entry_of(directory)
    with storage_errors(directory, "publish"):
        if entry is None or not (partial / MANIFEST).is_file():
            return
        with publishing(directory.parent, entry.stage):
            if not (partial / MANIFEST).is_file():  # another process finished it in the meantime
                return
            try:
                artifact = read_artifact(partial, entry.stage)
                verify_payload(artifact, set(payload(partial, without_work=True)))
                if artifact.fingerprint[:16] != entry.short:
                    raise CorruptArtifact(f"{partial}: the manifest has another fingerprint")
            except CorruptArtifact:
                (partial / MANIFEST).unlink(missing_ok=True)
            else:
                commit(partial, directory)


def publishing(folder: Path, stage: str) -> AbstractContextManager[None]:
    """Return the lock for publishing a stage's artefact. The lock is held only briefly, so that readers can call `complete`.

    A run holds another lock for hours (`Store.lock`).
    """
    return lock(folder / ".publishing", f"publishing {stage}")


def seal(partial: Path) -> dict[str, FileEntry]:
    """Hash and fsync the files in `partial`, and return the manifest's entry for each. Leftovers of killed calls are deleted.

    Raises:
        ValueError: The folder holds a link or something else that is not a regular file.
    """
    _sweep(partial)
    files = {name: _seal(partial / name) for name in payload(partial, without_work=True)}
    for folder in {(partial / name).parent for name in files} - {partial}:
        fsync_directory(folder)
    return files


def _sweep(partial: Path) -> None:
    """Delete files that a killed atomic write or a killed publication left in `partial`."""
    (partial / MANIFEST).unlink(missing_ok=True)
    for name in list(payload(partial, without_work=True)):
        if is_temporary(Path(name).name):
            (partial / name).unlink()


def _seal(path: Path) -> FileEntry:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is not a regular file and cannot be published")
    entry = FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
    fsync_file(path)
    return entry


def commit(partial: Path, directory: Path) -> None:
    """Remove `work` and rename the folder `partial` to `directory`. Its files and manifest must be on the disk already.

    A folder cannot replace a folder with files, so an old artefact is first renamed to `.trash`. A kill between the two renames
    leaves the committed `.partial`, and `complete` finishes it.
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
