"""The artefact store: immutable directories that a manifest vouches for, published by one rename.

    root/store/<stage>-<fingerprint[:16]>/            payload + manifest.json, complete or absent
    root/store/<stage>-<fingerprint[:16]>.partial/    a stage at work; survives kills, so that the stage can resume
    root/store/<stage>-....partial/work/              what a stage needs to resume; never published
    root/<recipe>/<stage> -> ../store/...             friendly name

Publishing hashes and fsyncs the payload, writes the manifest into the `.partial`, removes `work`, renames, and fsyncs
the folder. The manifest is the commit: a kill before it leaves `work` to resume from; after it, `find` finishes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from yolo_compress.atomic import (
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
from yolo_compress.errors import CorruptArtifact, RecipeError, StorageError
from yolo_compress.key import canonical, explain, fingerprint
from yolo_compress.lock import lock
from yolo_compress.manifest import (
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

_ENTRY = re.compile(r"[a-z0-9_]+-(?P<short>[0-9a-f]{16})(?P<state>|\.partial|\.trash)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


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
        """Holds the store for one run; see `yolo_compress.lock.lock`."""
        return lock(self.root / ".lock", what, wait)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artefact, or None. Reads the manifest and hashes no payload.

        Raises:
            CorruptArtifact: the directory is there and its manifest is not a sound one for this fingerprint.
        """
        directory = self.directory(stage, fingerprint)
        with storage_errors(directory, "read"):
            if directory.is_dir():
                return read_artifact(directory, stage, fingerprint)
            if not (_partial(directory) / MANIFEST).is_file():
                return None
        return self._complete(stage, fingerprint)

    def verify(self, artifact: Artifact) -> None:
        """Compares every byte of the artefact with its manifest; nothing is remembered from an earlier call.

        Raises:
            CorruptArtifact: names the first file that is changed, missing or not listed.
        """
        with storage_errors(artifact.path, "read"):
            if read_artifact(artifact.path, artifact.stage, artifact.fingerprint) != artifact:
                raise CorruptArtifact(f"{artifact.path / MANIFEST} was changed while in use. {mend(artifact.path)}")
            verify_payload(artifact, set(payload(artifact.path)))

    def partial(self, stage: str, fingerprint: str) -> Path:
        """The directory a stage writes into, made if missing; what an earlier, killed run left in it is still there."""
        partial = _partial(self.directory(stage, fingerprint))
        with storage_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
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
    ) -> Artifact:
        """Makes the `.partial` of this fingerprint the artefact; one that is there already is verified and kept.

        Args:
            key: the mapping whose hash `fingerprint` is; its `version` is the stage's.
            seconds: time the stage took, over all runs of it.

        Raises:
            ValueError: NaN in the metrics, a key of another fingerprint, a link among the files: a bug of the stage.
            CorruptArtifact: an artefact of this fingerprint is there and is damaged. The `.partial` stays.
        """
        manifest = Manifest(
            schema=SCHEMA,
            stage=stage,
            version=int(key["version"]),
            fingerprint=fingerprint,
            key=_plain(key),
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
            if directory.is_dir():
                published = read_artifact(directory, stage, fingerprint)
                self.verify(published)
                shutil.rmtree(partial, ignore_errors=True)
                return published
            _sweep(partial)
            files = {name: _seal(partial / name) for name in payload(partial, without_work=True)}
            for folder in {(partial / name).parent for name in files} - {partial}:
                fsync_directory(folder)
            manifest = Manifest(**{**vars(manifest), "files": files})
            atomic_write(partial / MANIFEST, manifest.to_json())
            return _commit(Artifact(partial, manifest), directory)

    def link(self, recipe: str, artifact: Artifact) -> None:
        """Points `root/<recipe>/<stage>` at the artefact, in one step.

        Raises:
            RecipeError: the recipe's name cannot be a folder's beside the store.
        """
        name = self._name(recipe, artifact.stage)
        with storage_errors(name, "link"):
            name.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(artifact.path, name.parent)
            if name.is_symlink() and os.readlink(name) == target:
                return
            if name.exists() and not name.is_symlink():
                raise StorageError(f"cannot link {name}: something that is no link is in its place; move it away")
            atomic_symlink(name, target)

    def linked(self, recipe: str, stage: str) -> Artifact | None:
        """The artefact behind the friendly name; None if there is no name or what it meant has been collected.

        Raises:
            CorruptArtifact: the artefact is there and its manifest is not sound.
        """
        name = self._name(recipe, stage)
        with storage_errors(name, "read"):
            directory = name.parent / os.readlink(name) if name.is_symlink() else name
            if not directory.is_dir() or directory.resolve().parent != self.folder.resolve():
                return None
            return read_artifact(self.folder / directory.name, stage)

    @staticmethod
    def explain(key_new: Mapping[str, Any], artifact_old: Artifact) -> list[str]:
        """Why the artefact is not the one for this key, a line a field; see `yolo_compress.key.explain`."""
        return explain(key_new, artifact_old.manifest.key)

    def gc(self, keep: set[str]) -> dict[Path, int]:
        """Removes artefacts and `.partial`s of other fingerprints than `keep`, and artefacts without a sound manifest.

        Only entries of `root/store` that have an artefact's name are looked at. The caller holds `lock`.

        Returns:
            Bytes freed by removed path.
        """
        short = {fingerprint[:16] for fingerprint in keep}
        removed: dict[Path, int] = {}
        with storage_errors(self.folder, "clean"):
            for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
                match = _ENTRY.fullmatch(path.name)
                if match is None:
                    continue
                wanted = match["short"] in short and match["state"] != ".trash"
                if not wanted or (match["state"] == "" and _is_damaged(path)):
                    removed[path] = _remove(path)
        return removed

    def recipes(self) -> list[str]:
        """Names under which artefacts have friendly names; other folders of the root (a user's, caches) are not looked into."""
        with storage_errors(self.root, "read"):
            folders = [path for path in self.root.iterdir() if path.is_dir() and path != self.folder]
        return sorted(path.name for path in folders if _NAME.fullmatch(path.name))

    def discard(self, stage: str, fingerprint: str) -> None:
        """Drops an artefact and its `.partial`, so that the stage runs again."""
        directory = self.directory(stage, fingerprint)
        for path in (directory, _partial(directory)):
            with storage_errors(path, "remove"):
                if path.is_dir():
                    _remove(path)

    def discard_readers(self, fingerprint: str) -> None:
        """Drops what was made of this artefact, directly or through others: the bytes it was made of are there no more."""
        manifests, gone = list(self._manifests()), {fingerprint}
        for _ in manifests:  # as deep as a chain can be
            gone |= {one.fingerprint for one in manifests if gone & set(one.key.get("inputs", {}).values())}
        for one in manifests:
            if one.fingerprint in gone - {fingerprint}:
                self.discard(one.stage, one.fingerprint)

    def _manifests(self) -> Iterator[Manifest]:
        """Those of the artefacts that have a sound one."""
        with storage_errors(self.folder, "read"):
            for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
                match = _ENTRY.fullmatch(path.name)
                if match is not None and match["state"] == "" and not _is_damaged(path):
                    yield Manifest.from_json((path / MANIFEST).read_bytes())

    def _name(self, recipe: str, stage: str) -> Path:
        if not _NAME.fullmatch(recipe) or recipe == self.folder.name:
            raise RecipeError(f"recipe name {recipe!r}: letters, digits, '.', '_', '-', and not 'store'; rename it")
        return self.root / recipe / stage

    def _publishing(self, stage: str) -> AbstractContextManager[None]:
        # Distinct from `lock`, which a run holds for hours: readers take this one to complete a killed publication.
        return lock(self.folder / ".publishing", f"publishing {stage}")

    def _complete(self, stage: str, fingerprint: str) -> Artifact | None:
        """Finishes a publication that was killed after its manifest; drops a manifest that later writes made untrue."""
        directory = self.directory(stage, fingerprint)
        partial = _partial(directory)
        with storage_errors(directory, "publish"), self._publishing(stage):
            if directory.is_dir():
                return read_artifact(directory, stage, fingerprint)
            try:
                artifact = read_artifact(partial, stage, fingerprint)
                verify_payload(artifact, set(payload(partial, without_work=True)))
            except CorruptArtifact:
                (partial / MANIFEST).unlink(missing_ok=True)
                return None
            return _commit(artifact, directory)


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


def _commit(artifact: Artifact, directory: Path) -> Artifact:
    """The payload is durable and the manifest vouches for it: what is left is to drop the work folder and to rename."""
    crash_point("before removal of work")
    if (artifact.path / WORK).is_dir():
        shutil.rmtree(artifact.path / WORK)
    crash_point("after removal of work")
    replace(artifact.path, directory)
    return Artifact(directory, artifact.manifest)


def _is_damaged(path: Path) -> bool:
    try:
        Manifest.from_json((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    return False


def _remove(path: Path) -> int:
    """Renames first, so that a kill leaves no half of an artefact under its name. Returns the bytes it held."""
    if path.is_symlink() or not path.is_dir():
        size = path.lstat().st_size
        path.unlink()
        return size
    trash = path.with_name(path.name.removesuffix(".partial").removesuffix(".trash") + ".trash")
    if trash != path:
        if trash.is_dir():
            shutil.rmtree(trash)
        os.replace(path, trash)
        crash_point(f"after renaming {path.name} to trash")
    size = sum(file.lstat().st_size for file in trash.rglob("*") if not file.is_dir())
    shutil.rmtree(trash)
    return size
