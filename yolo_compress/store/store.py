"""The artefact store: immutable folders with a manifest, published by one rename.

    root/store/<stage>-<fingerprint[:16]>/            payload and manifest.json, complete or absent
    root/store/<stage>-<fingerprint[:16]>.partial/    output of a running or killed stage, which can resume
    root/store/<stage>-....partial/work/              files that a stage needs to resume; never published
    root/<recipe>/<stage> -> ../store/...             link to a result of the recipe

`publication` describes the steps of publishing, and the state after a kill between them. A stage that runs again also writes into
its `.partial`. The old artefact stays until the new artefact is committed.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from yolo_compress import home
from yolo_compress.errors import CorruptArtifact, RecipeError, StorageError
from yolo_compress.files.atomic import atomic_symlink, atomic_write, fsync_directory, storage_errors
from yolo_compress.files.lock import lock
from yolo_compress.runtime import json_text
from yolo_compress.store.entries import FOLDER, entry_of, partial_of, remove
from yolo_compress.store.environment import Environment
from yolo_compress.store.fingerprint import canonical, plain
from yolo_compress.store.manifest import (
    BEGUN,
    MANIFEST,
    SCHEMA,
    Artifact,
    Manifest,
    fix_hint,
    payload,
    read_artifact,
    verify_payload,
)
from yolo_compress.store.publication import commit, complete, publishing, seal


class Store:
    """The store of all stage results (artefacts): a folder `root/store`, and links `root/<recipe>/<stage>` into it.

    Publishing and garbage collection (`garbage.gc`) need `lock`. Finding and verifying do not. Every method raises `StorageError`
    if the file system reports an error.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.folder = self.root / FOLDER

    def directory(self, stage: str, fingerprint: str) -> Path:
        """Return the folder of an artefact, which need not exist."""
        return self.folder / f"{stage}-{fingerprint[:16]}"

    def lock(self, what: str, wait: bool = True) -> AbstractContextManager[None]:
        """Return the lock of the store: only one run at a time may publish or remove artefacts. See `files.lock.lock`."""
        return lock(self.root / ".lock", what, wait)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the published artefact, or None. Only the manifest is read. `verify` checks the payload.

        Raises:
            CorruptArtifact: The folder exists, but its manifest is damaged or of another fingerprint.
        """
        directory = self.directory(stage, fingerprint)
        complete(directory)
        with storage_errors(directory, "read"):
            return read_artifact(directory, stage, fingerprint) if directory.is_dir() else None

    def verify(self, artifact: Artifact) -> None:
        """Check every file of the artefact against the hashes in its manifest. Each call reads all files again.

        Raises:
            CorruptArtifact: A file is changed, missing or not listed.
        """
        with storage_errors(artifact.path, "read"):
            if read_artifact(artifact.path, artifact.stage, artifact.fingerprint) != artifact:
                raise CorruptArtifact(f"{artifact.path / MANIFEST} was changed while in use. {fix_hint(artifact.path)}")
            verify_payload(artifact, set(payload(artifact.path)))

    def partial(self, stage: str, fingerprint: str, inputs: Mapping[str, str] | None = None) -> Path:
        """Return the folder that a stage writes into before its result is published. It is created if needed.

        Files of an earlier, killed run stay in the folder.

        Args:
            stage: Name of the stage.
            fingerprint: Fingerprint of the stage.
            inputs: Name of an input -> `content` of its artefact. A folder from a run with other inputs is deleted first. None: no
                check.
        """
        partial = partial_of(self.directory(stage, fingerprint))
        with storage_errors(partial):
            if inputs is not None and partial.is_dir() and _begun_from(partial) != dict(inputs):
                remove(partial)
            partial.mkdir(parents=True, exist_ok=True)
            if inputs:
                atomic_write(partial / BEGUN, canonical(inputs))
            fsync_directory(self.root)
            fsync_directory(self.folder)
        return partial

    def publish(
        self,
        stage: str,
        fingerprint: str,
        key: Mapping[str, object],
        metrics: Mapping[str, object],
        environment: Environment,
        seconds: float,
        inputs: Mapping[str, str] = MappingProxyType({}),
        recipe: str | None = None,
    ) -> Artifact:
        """Publish the folder that the stage wrote as the artefact of this fingerprint. It replaces an old artefact.

        Args:
            stage: Name of the stage.
            fingerprint: Fingerprint of the stage.
            key: Mapping whose hash is `fingerprint`.
            metrics: Metrics of the stage.
            environment: Machine and library versions.
            seconds: Run time of the stage.
            inputs: Name of an input in `key` -> `content` of the artefact that the stage read.
            recipe: Name of the recipe. Its link is set in the same step, so that a kill leaves no artefact without a link.

        Raises:
            ValueError: The metrics hold NaN, the key has another fingerprint, or a file is a link. This is a bug of the stage.
        """
        written = plain(key)
        manifest = Manifest(
            schema=SCHEMA,
            stage=stage,
            version=int(written["version"]),
            fingerprint=fingerprint,
            key=written,
            inputs=dict(inputs),
            files={},
            metrics=plain(metrics),
            environment=environment.copy(),
            seconds=round(float(seconds), 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        manifest.check()
        directory = self.directory(stage, fingerprint)
        partial = partial_of(directory)
        with storage_errors(directory, "publish"), publishing(self.folder, stage):
            if directory.is_dir() and not partial.is_dir():  # another process published it in the meantime
                return read_artifact(directory, stage, fingerprint)
            manifest = replace(manifest, files=seal(partial))
            atomic_write(partial / MANIFEST, manifest.to_json())
            if recipe is not None:
                self.link(recipe, Artifact(directory, manifest))
            commit(partial, directory)
            return Artifact(directory, manifest)

    def check_name(self, recipe: str, stage: str) -> None:
        """Check, before any stage runs, that `link` will succeed. Create the recipe's folder of links.

        Raises:
            RecipeError: The recipe's name is not allowed as name of a folder in `root`.
            StorageError: There is a file or folder at the place of the link.
        """
        name = self._name(recipe, stage)
        with storage_errors(name.parent, "make"):
            name.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(name) and not name.is_symlink():
            raise StorageError(f"cannot link {name}: there is already a file or folder with this name; move it away")

    def check_outside(self, path: Path, option: str) -> None:
        """Check that an output path is outside this store, and outside artefacts of other stores. Links are followed.

        Raises:
            RecipeError: The path is in a store. The message names `option`.
        """
        with storage_errors(path, "read"):
            real = Path(os.path.realpath(path))
            store = self.folder.resolve()
        for folder in (real, *real.parents):
            if folder == store or (folder.parent.name == FOLDER and entry_of(folder)):
                raise RecipeError(
                    f"{option}={path}: lies in the artefact store {store}, whose files never change; give another place"
                )

    def link(self, recipe: str, artifact: Artifact) -> None:
        """Set the link `root/<recipe>/<stage>` to the artefact, atomically.

        Raises:
            RecipeError: The recipe's name is not allowed as name of a folder in `root`.
        """
        name = self._name(recipe, artifact.stage)
        self.check_name(recipe, artifact.stage)
        with storage_errors(name, "link"):
            target = os.path.relpath(artifact.path, name.parent)
            if not (name.is_symlink() and os.readlink(name) == target):
                atomic_symlink(name, target)

    def linked(self, recipe: str, stage: str) -> Artifact | None:
        """Return the artefact that the link `root/<recipe>/<stage>` points to. None: the link or the artefact does not exist.

        Raises:
            CorruptArtifact: The manifest of the artefact is damaged.
        """
        name = self._name(recipe, stage)
        with storage_errors(name, "read"):
            directory = name.parent / os.readlink(name) if name.is_symlink() else name
            if directory.parent.resolve() == self.folder.resolve():
                complete(self.folder / directory.name)
            if not directory.is_dir() or directory.resolve().parent != self.folder.resolve():
                return None
            return read_artifact(self.folder / directory.name, stage)

    def recipes(self) -> list[str]:
        """Return the names of the folders in `root` that can hold the links of a recipe, sorted."""
        with storage_errors(self.root, "read"):
            folders = [path for path in self.root.iterdir() if path.is_dir() and path != self.folder]
        return sorted(path.name for path in folders if home.is_recipe_name(path.name))

    def _name(self, recipe: str, stage: str) -> Path:
        if not home.is_recipe_name(recipe):
            raise RecipeError(f"recipe name {recipe!r} cannot be the name of a folder in {self.root}/; rename the file")
        return self.root / recipe / stage


def _begun_from(partial: Path) -> dict[str, str]:
    """Return input name -> `content`, for the inputs that a `.partial` was begun with. Empty: they are not recorded."""
    try:
        return dict(json_text.read(partial / BEGUN))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
