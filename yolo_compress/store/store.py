"""The artefact store: immutable directories that a manifest vouches for, published by one rename.

    root/store/<stage>-<fingerprint[:16]>/            payload + manifest.json, complete or absent
    root/store/<stage>-<fingerprint[:16]>.partial/    a stage at work; survives kills, so that the stage can resume
    root/store/<stage>-....partial/work/              what a stage needs to resume; never published
    root/<recipe>/<stage> -> ../store/...             friendly name

Publishing hashes and fsyncs the payload, writes the manifest into the `.partial`, removes `work`, renames, and fsyncs
the folder. The manifest is the commit: a kill before it leaves `work` to resume from; after it, `find` finishes.
A stage that runs again works in its `.partial` too: the artefact that is there stays until the new one is committed.
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
    mend,
    payload,
    read_artifact,
    verify_payload,
)
from yolo_compress.store.publication import commit, complete, publishing, seal


class Store:
    """Artefacts under `root/store`. Publishing needs `lock`, as garbage collection does (`collect.gc`); finding and verifying do not.

    Every method raises `StorageError` when the file system refuses.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.folder = self.root / FOLDER

    def directory(self, stage: str, fingerprint: str) -> Path:
        """Where the artefact is or will be."""
        return self.folder / f"{stage}-{fingerprint[:16]}"

    def lock(self, what: str, wait: bool = True) -> AbstractContextManager[None]:
        """Holds the store for one run; see `yolo_compress.files.lock.lock`."""
        return lock(self.root / ".lock", what, wait)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artefact, or None. Reads the manifest and hashes no payload.

        Raises:
            CorruptArtifact: the directory is there and its manifest is not a sound one for this fingerprint.
        """
        directory = self.directory(stage, fingerprint)
        complete(directory)
        with storage_errors(directory, "read"):
            return read_artifact(directory, stage, fingerprint) if directory.is_dir() else None

    def verify(self, artifact: Artifact) -> None:
        """Compares every byte of the artefact with its manifest; nothing is remembered from an earlier call.

        Raises:
            CorruptArtifact: names the first file that is changed, missing or not listed.
        """
        with storage_errors(artifact.path, "read"):
            if read_artifact(artifact.path, artifact.stage, artifact.fingerprint) != artifact:
                raise CorruptArtifact(f"{artifact.path / MANIFEST} was changed while in use. {mend(artifact.path)}")
            verify_payload(artifact, set(payload(artifact.path)))

    def partial(self, stage: str, fingerprint: str, inputs: Mapping[str, str] | None = None) -> Path:
        """The directory a stage writes into, made if missing; what an earlier, killed run left in it is still there.

        Args:
            inputs: `content` of each input. What was begun from other bytes is dropped. None: not looked at.
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
        """Makes the `.partial` of this fingerprint the artefact, in the place of one that is there.

        Args:
            key: the mapping whose hash `fingerprint` is; its `version` is the stage's.
            seconds: time the stage took, over all runs of it.
            inputs: `content` of the artefacts that the stage read, by their names in the key.
            recipe: gives the friendly name together with the commit, so that a kill leaves none without.

        Raises:
            ValueError: NaN in the metrics, a key of another fingerprint, a link among the files: a bug of the stage.
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
            if directory.is_dir() and not partial.is_dir():  # another process has just published this one
                return read_artifact(directory, stage, fingerprint)
            manifest = replace(manifest, files=seal(partial))
            atomic_write(partial / MANIFEST, manifest.to_json())
            if recipe is not None:
                self.link(recipe, Artifact(directory, manifest))
            commit(partial, directory)
            return Artifact(directory, manifest)

    def check_name(self, recipe: str, stage: str) -> None:
        """Refuses, before any work, what `link` would refuse; makes the folder of the friendly names.

        Raises:
            RecipeError: the recipe's name cannot be a folder's beside the store.
            StorageError: something else is in the name's place.
        """
        name = self._name(recipe, stage)
        with storage_errors(name.parent, "make"):
            name.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(name) and not name.is_symlink():
            raise StorageError(f"cannot link {name}: something that is no link is in its place; move it away")

    def check_outside(self, path: Path, option: str) -> None:
        """Refuses a path to write to that lies in this store or is an artefact of another.

        Raises:
            RecipeError: it does; following links.
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
        """Points `root/<recipe>/<stage>` at the artefact, in one step.

        Raises:
            RecipeError: the recipe's name cannot be a folder's beside the store.
        """
        name = self._name(recipe, artifact.stage)
        self.check_name(recipe, artifact.stage)
        with storage_errors(name, "link"):
            target = os.path.relpath(artifact.path, name.parent)
            if not (name.is_symlink() and os.readlink(name) == target):
                atomic_symlink(name, target)

    def linked(self, recipe: str, stage: str) -> Artifact | None:
        """The artefact behind the friendly name; None if there is no name or what it meant has been collected.

        Raises:
            CorruptArtifact: the artefact is there and its manifest is not sound.
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
        """Names under which artefacts have friendly names; other folders of the root (a user's, caches) are not looked into."""
        with storage_errors(self.root, "read"):
            folders = [path for path in self.root.iterdir() if path.is_dir() and path != self.folder]
        return sorted(path.name for path in folders if home.is_recipe_name(path.name))

    def _name(self, recipe: str, stage: str) -> Path:
        if not home.is_recipe_name(recipe):
            raise RecipeError(f"recipe name {recipe!r} cannot be the name of a folder in {self.root}/; rename the file")
        return self.root / recipe / stage


def _begun_from(partial: Path) -> dict[str, str]:
    """`content` of the inputs that the `.partial` was begun from; of one that does not say, none."""
    try:
        return dict(json_text.read(partial / BEGUN))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
