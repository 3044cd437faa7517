"""Garbage collection: remove artefacts that no recipe needs, and list interrupted stages."""

from pathlib import Path

from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime import json_text
from yolo_compress.store.entries import PARTIAL, can_continue, entries, remove, size_bytes
from yolo_compress.store.manifest import MANIFEST, Manifest
from yolo_compress.store.store import Store


def gc(store: Store, keep: set[str]) -> dict[Path, int]:
    """Remove all artefacts and `.partial` folders whose fingerprint is not in `keep`, and artefacts with a damaged manifest.

    A `.partial` folder that a stage can continue from stays (see `interrupted`). Files with other names in `root/store` also stay. The
    caller must hold `store.lock`.

    Returns:
        Removed path -> its size in bytes.

    Raises:
        StorageError: A file cannot be read or removed.
    """
    short = {fingerprint[:16] for fingerprint in keep}
    removed: dict[Path, int] = {}
    with storage_errors(store.folder, "clean"):
        for entry in entries(store.folder):
            if entry.state == PARTIAL:
                wanted = entry.short in short or can_continue(entry.path)
            else:
                wanted = entry.short in short and entry.state == "" and not _is_damaged(entry.path)
            if not wanted:
                removed[entry.path] = remove(entry.path)
    return removed


def interrupted(store: Store) -> dict[Path, int]:
    """Return the `.partial` folders that a killed stage can continue from, each with its size in bytes.

    Raises:
        StorageError: The store cannot be read.
    """
    with storage_errors(store.folder, "read"):
        return {
            entry.path: size_bytes(entry.path)
            for entry in entries(store.folder)
            if entry.state == PARTIAL and entry.path.is_dir() and can_continue(entry.path)
        }


def _is_damaged(path: Path) -> bool:
    """Return whether the manifest of an artefact is missing or damaged. If the file system cannot read it, return False."""
    try:
        Manifest.from_json(json_text.content(path / MANIFEST) if (path / MANIFEST).is_file() else b"")
    except ValueError:
        return True
    except OSError:
        return False
    return False
