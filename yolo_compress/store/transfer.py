"""Take artefacts of one store into another one. Files become hard links where the file system allows it: artefacts never change."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from yolo_compress.files.atomic import fsync_directory, fsync_file, storage_errors
from yolo_compress.store.entries import partial_of, remove
from yolo_compress.store.manifest import MANIFEST, Artifact, payload
from yolo_compress.store.publication import commit, publishing
from yolo_compress.store.store import Store


def adopt(artifact: Artifact, store: Store) -> Artifact:
    """Publish an artefact of another store in `store`, and return it. If `store` has one of this fingerprint, that one is returned.

    The caller must hold `store.lock`.

    Raises:
        CorruptArtifact: A file of the artefact differs from its manifest.
        StorageError: The file system failed.
    """
    stage, fingerprint = artifact.stage, artifact.fingerprint
    if there := store.find(stage, fingerprint):
        return there
    artifact_store = Store(artifact.path.parents[1])
    artifact_store.verify(artifact)
    directory = store.directory(stage, fingerprint)
    partial = partial_of(directory)
    with storage_errors(directory, "publish"), publishing(store.folder, stage):
        if partial.exists():  # of a killed run, which this result replaces
            remove(partial)
        for name in [*payload(artifact.path), MANIFEST]:  # the manifest last: with it, the partial counts as complete
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(artifact.path / name, target)
        fsync_directory(partial)
        commit(partial, directory)
    return Artifact(directory, artifact.manifest)


def _link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where that is not possible."""
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
    fsync_file(target)
