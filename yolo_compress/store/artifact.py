"""The artefact store: immutable directories that a manifest vouches for, published by one rename.

    root/store/<stage>-<fingerprint[:16]>/            payload + manifest.json, complete or absent
    root/store/<stage>-<fingerprint[:16]>.partial/    a stage at work; survives kills, so that the stage can resume
    root/store/<stage>-....partial/work/              what a stage needs to resume; never published
    root/<recipe>/<stage> -> ../store/...             friendly name

Publishing hashes and fsyncs the payload, writes the manifest into the `.partial`, removes `work`, renames, and fsyncs
the folder. The manifest is the commit: a kill before it leaves `work` to resume from; after it, `find` finishes.
A stage that runs again works in its `.partial` too: the artefact that is there stays until the new one is committed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yolo_compress import home
from yolo_compress.errors import CorruptArtifact, RecipeError, StorageError
from yolo_compress.files.atomic import (
    atomic_path,
    atomic_symlink,
    atomic_write,
    crash_point,
    fsync_directory,
    fsync_file,
    is_temporary,
    replace,
    storage_errors,
)
from yolo_compress.files.lock import lock
from yolo_compress.runtime import json_text
from yolo_compress.store.fingerprint import canonical, explain, fingerprint
from yolo_compress.store.manifest import (
    BEGUN,
    MANIFEST,
    SCHEMA,
    WORK,
    Artifact,
    Manifest,
    mend,
    payload,
    read_artifact,
    sha256_file,
    verify_payload,
)

__all__ = [
    "Artifact", "Manifest", "Store", "atomic_path", "atomic_write", "canonical", "explain", "fingerprint", "sha256_file"
]  # fmt: skip

_ENTRY = re.compile(r"(?P<stage>[a-z0-9_]+)-(?P<short>[0-9a-f]{16})(?P<state>|\.partial|\.trash)")


class Store:
    """Artefacts under `root/store`. Publishing and collecting garbage need `lock`; finding and verifying do not.

    Every method raises `StorageError` when the file system refuses.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.folder = self.root / "store"

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
        self._complete(directory)
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
        partial = _partial(self.directory(stage, fingerprint))
        with storage_errors(partial):
            if inputs is not None and partial.is_dir() and _begun_from(partial) != dict(inputs):
                _remove(partial)
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
        key: Mapping[str, Any],
        metrics: Mapping[str, Any],
        environment: Mapping[str, Any],
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
        manifest = Manifest(
            schema=SCHEMA,
            stage=stage,
            version=int(key["version"]),
            fingerprint=fingerprint,
            key=_plain(key),
            inputs=dict(inputs),
            files={},
            metrics=_plain(metrics),
            environment=_plain(environment),
            seconds=round(float(seconds), 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        manifest.check()
        directory = self.directory(stage, fingerprint)
        partial = _partial(directory)
        with storage_errors(directory, "publish"), self._publishing(stage):
            if directory.is_dir() and not partial.is_dir():  # another process has just published this one
                return read_artifact(directory, stage, fingerprint)
            _sweep(partial)
            files = {name: _seal(partial / name) for name in payload(partial, without_work=True)}
            for folder in {(partial / name).parent for name in files} - {partial}:
                fsync_directory(folder)
            manifest = Manifest(**{**vars(manifest), "files": files})
            atomic_write(partial / MANIFEST, manifest.to_json())
            if recipe is not None:
                self.link(recipe, Artifact(directory, manifest))
            _commit(partial, directory)
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
            if folder == store or (folder.parent.name == self.folder.name and _ENTRY.fullmatch(folder.name)):
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
                self._complete(self.folder / directory.name)
            if not directory.is_dir() or directory.resolve().parent != self.folder.resolve():
                return None
            return read_artifact(self.folder / directory.name, stage)

    @staticmethod
    def explain(key_new: Mapping[str, Any], artifact_old: Artifact) -> list[str]:
        """Why the artefact is not the one for this key, a line a field; see `yolo_compress.store.fingerprint.explain`."""
        return explain(key_new, artifact_old.manifest.key)

    def gc(self, keep: set[str]) -> dict[Path, int]:
        """Removes artefacts and `.partial`s of other fingerprints than `keep`, and artefacts without a sound manifest.

        A `.partial` that its stage can continue stays, see `interrupted`. Only entries of `root/store` that have an
        artefact's name are looked at. The caller holds `lock`.

        Returns:
            Bytes freed by removed path.
        """
        short = {fingerprint[:16] for fingerprint in keep}
        removed: dict[Path, int] = {}
        with storage_errors(self.folder, "clean"):
            for path, short_name, state in self._entries():
                if state == ".partial":
                    wanted = short_name in short or _can_continue(path)
                else:
                    wanted = short_name in short and state == "" and not _is_damaged(path)
                if not wanted:
                    removed[path] = _remove(path)
        return removed

    def interrupted(self) -> dict[Path, int]:
        """The `.partial`s that their stage can continue, with their bytes."""
        with storage_errors(self.folder, "read"):
            return {
                path: _bytes(path)
                for path, _, state in self._entries()
                if state == ".partial" and path.is_dir() and _can_continue(path)
            }

    def recipes(self) -> list[str]:
        """Names under which artefacts have friendly names; other folders of the root (a user's, caches) are not looked into."""
        with storage_errors(self.root, "read"):
            folders = [path for path in self.root.iterdir() if path.is_dir() and path != self.folder]
        return sorted(path.name for path in folders if home.is_recipe_name(path.name))

    def _entries(self) -> Iterator[tuple[Path, str, str]]:
        """Path, short fingerprint and state ("", ".partial" or ".trash") of what has an artefact's name."""
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if match := _ENTRY.fullmatch(path.name):
                yield path, match["short"], match["state"]

    def _name(self, recipe: str, stage: str) -> Path:
        if not home.is_recipe_name(recipe):
            raise RecipeError(f"recipe name {recipe!r} cannot be the name of a folder in {self.root}/; rename the file")
        return self.root / recipe / stage

    def _publishing(self, stage: str) -> AbstractContextManager[None]:
        # Distinct from `lock`, which a run holds for hours: readers take this one to complete a killed publication.
        return lock(self.folder / ".publishing", f"publishing {stage}")

    def _complete(self, directory: Path) -> None:
        """Finishes a publication that was killed after its manifest; drops a manifest that later writes made untrue."""
        partial, match = _partial(directory), _ENTRY.fullmatch(directory.name)
        with storage_errors(directory, "publish"):
            if match is None or not (partial / MANIFEST).is_file():
                return
            with self._publishing(match["stage"]):
                if not (partial / MANIFEST).is_file():  # somebody else has finished it meanwhile
                    return
                try:
                    artifact = read_artifact(partial, match["stage"])
                    verify_payload(artifact, set(payload(partial, without_work=True)))
                    if artifact.fingerprint[:16] != match["short"]:
                        raise CorruptArtifact(f"{partial}: the manifest is that of another")
                except CorruptArtifact:
                    (partial / MANIFEST).unlink(missing_ok=True)
                else:
                    _commit(partial, directory)


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON copy: tuples become lists, as they will be when the manifest is read back."""
    return json.loads(canonical(value))


def _sweep(partial: Path) -> None:
    """Removes what a killed atomic write or a killed publication left among the payload."""
    (partial / MANIFEST).unlink(missing_ok=True)
    for name in list(payload(partial, without_work=True)):
        if is_temporary(Path(name).name):
            (partial / name).unlink()


def _seal(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is no regular file and cannot be published")
    entry = {"sha256": sha256_file(path), "size": path.stat().st_size}
    fsync_file(path)
    return entry


def _commit(partial: Path, directory: Path) -> None:
    """The payload is durable and the manifest vouches for it: what is left is to drop the work folder and to rename.

    A directory cannot be renamed over one that has files. So the artefact that is there moves aside first; a kill between
    the two renames leaves the committed `.partial`, which `find` and `linked` finish.
    """
    crash_point("before removal of work")
    if (partial / WORK).is_dir():
        shutil.rmtree(partial / WORK)
    (partial / BEGUN).unlink(missing_ok=True)
    crash_point("after removal of work")
    trash = _to_trash(directory) if os.path.lexists(directory) else None
    replace(partial, directory)
    if trash is not None:
        _delete(trash)


def _begun_from(partial: Path) -> dict[str, Any]:
    """`content` of the inputs that the `.partial` was begun from; of one that does not say, none."""
    try:
        return dict(json_text.read(partial / BEGUN))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _can_continue(partial: Path) -> bool:
    """Whether a stage can resume from it, or has only to be published."""
    return (partial / MANIFEST).is_file() or ((partial / WORK).is_dir() and any((partial / WORK).iterdir()))


def _is_damaged(path: Path) -> bool:
    """Whether there is no sound manifest. What cannot be read is not judged."""
    try:
        Manifest.from_json(json_text.content(path / MANIFEST) if (path / MANIFEST).is_file() else b"")
    except ValueError:
        return True
    except OSError:
        return False
    return False


def _remove(path: Path) -> int:
    """Renames first, so that a kill leaves no half of an artefact under its name. Returns the bytes it held."""
    size = _bytes(path)
    _delete(_to_trash(path))
    return size


def _to_trash(path: Path) -> Path:
    trash = path.with_name(path.name.removesuffix(".partial").removesuffix(".trash") + ".trash")
    if trash != path:
        if os.path.lexists(trash):
            _delete(trash)
        os.replace(path, trash)
        crash_point(f"after renaming {path.name} to trash")
    return trash


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _bytes(path: Path) -> int:
    files = (
        [path] if path.is_symlink() or not path.is_dir() else [file for file in path.rglob("*") if not file.is_dir()]
    )
    return sum(file.lstat().st_size for file in files)
