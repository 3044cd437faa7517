"""Garbage collection: what in the store no recipe needs, and what interrupted stages left to continue from."""

from pathlib import Path

from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime import json_text
from yolo_compress.store.entries import PARTIAL, can_continue, entries, remove, size_bytes
from yolo_compress.store.manifest import MANIFEST, Manifest
from yolo_compress.store.store import Store


def gc(store: Store, keep: set[str]) -> dict[Path, int]:
    """Remove artefacts and `.partial`s of other fingerprints than `keep`, and artefacts without a sound manifest.

    A `.partial` that its stage can continue stays, see `interrupted`. Only entries of `root/store` that have an artefact's
    name are looked at. The caller holds `store.lock`.

    Returns:
        Bytes freed by removed path.

    Raises:
        StorageError: The file system refuses.
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
    """The `.partial`s that their stage can continue, with their bytes.

    Raises:
        StorageError: The file system refuses.
    """
    with storage_errors(store.folder, "read"):
        return {
            entry.path: size_bytes(entry.path)
            for entry in entries(store.folder)
            if entry.state == PARTIAL and entry.path.is_dir() and can_continue(entry.path)
        }


def _is_damaged(path: Path) -> bool:
    """Whether there is no sound manifest. What cannot be read is not judged."""
    try:
        Manifest.from_json(json_text.content(path / MANIFEST) if (path / MANIFEST).is_file() else b"")
    except ValueError:
        return True
    except OSError:
        return False
    return False
