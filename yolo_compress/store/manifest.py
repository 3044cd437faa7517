"""The manifest of an artefact, and the check of its files against the manifest."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from yolo_compress.errors import CorruptArtifact
from yolo_compress.runtime import json_text
from yolo_compress.runtime.files import FileEntry, sha256_file
from yolo_compress.store.environment import Environment
from yolo_compress.store.fingerprint import canonical, fingerprint

SCHEMA = 2
MANIFEST = "manifest.json"
WORK = "work"
BEGUN = "work.json"  # in the `.partial`: content hashes of the inputs that `work` was made from


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`: how an artefact was made, and the hashes of its files.

    Attributes:
        schema: Version of the manifest's format.
        stage: Stage that made the artefact.
        version: Version of the stage.
        fingerprint: SHA-256 of `key`, in hex.
        key: Everything that decides the result of the stage.
        inputs: Name of an input in `key` -> property `content` of the artefact that was read.
        files: Name of a file of the artefact -> hash and size of that file. Names are relative, with `/`.
        metrics: Metrics of the stage.
        environment: Machine and library versions.
        seconds: Run time of the stage.
        created: Date and time in UTC, ISO 8601. Only for people.
    """

    schema: int
    stage: str
    version: int
    fingerprint: str
    key: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    metrics: dict[str, Any]
    environment: Environment
    seconds: float
    created: str

    @property
    def content(self) -> str:
        """SHA-256, in hex, of the artefact's files and metrics. Two runs with the same key may have different `content`."""
        return hashlib.sha256(canonical({"files": self.files, "metrics": self.metrics}).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of the manifest, with a checksum over all fields. The checksum also reveals a changed metric.

        Raises:
            ValueError: A metric is NaN or infinite.
        """
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        checksum = hashlib.sha256(canonical(content).encode()).hexdigest()
        return json.dumps({**content, "checksum": checksum}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Parse the text of a manifest.

        Schema 1 is also accepted. It has no `inputs`, so the artefact of a stage with inputs is then stale.

        Raises:
            ValueError: The text is not a manifest, has another schema, was changed, or lists a file outside its folder.
        """
        return cls._from_content(json_text.parse(text.encode() if isinstance(text, str) else text))

    @classmethod
    def _from_content(cls, content: Any) -> "Manifest":
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, expected an object")
        if content.get("schema") not in (1, SCHEMA):
            raise ValueError(f"schema is {content.get('schema')!r}, this version reads {SCHEMA}")
        checksum = content.pop("checksum", None)
        if checksum != hashlib.sha256(canonical(content).encode()).hexdigest():
            raise ValueError("its checksum does not match its content")
        if content["schema"] == 1:
            content.setdefault("inputs", {})
        names = {field.name for field in fields(cls)}
        if content.keys() != names:
            raise ValueError(f"fields differ from the schema's: {', '.join(sorted(content.keys() ^ names))}")
        manifest = cls(**content)
        manifest.check()
        return manifest

    def check(self) -> None:
        for field in ("key", "inputs", "files", "metrics", "environment"):
            if not isinstance(getattr(self, field), dict):
                raise ValueError(f"{field} is not an object")
        if fingerprint(self.key) != self.fingerprint:
            raise ValueError("its fingerprint is not the hash of its key")
        for name, entry in self.files.items():
            if not is_inside(name) or name == MANIFEST:
                raise ValueError(f"lists the file {name!r}, which is not inside its folder")
            if not isinstance(entry, dict) or [type(entry.get(key)) for key in ("sha256", "size")] != [str, int]:
                raise ValueError(f"entry of {name!r} lacks sha256 or size")


@dataclass(frozen=True)
class Artifact:
    """The stored result of a stage: a folder in the store. Its files never change.

    Attributes:
        path: Path of the folder.
        manifest: Content of its `manifest.json`.
    """

    path: Path
    manifest: Manifest

    @property
    def stage(self) -> str:
        """Name of the stage that made the artefact."""
        return self.manifest.stage

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that decides the result of the stage."""
        return self.manifest.fingerprint

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the stage. The unit is in the name (`..._ms`, `..._mib`). mAP is a fraction from 0 to 1."""
        return self.manifest.metrics

    def file(self, name: str) -> Path:
        """Return the path of a payload file.

        Args:
            name: Name relative to `path`, such as `model.pt` or `compressed/int8.onnx`.

        Raises:
            CorruptArtifact: The manifest does not list such a file.
        """
        if name not in self.manifest.files:
            listed = ", ".join(sorted(self.manifest.files)) or "none"
            raise CorruptArtifact(
                f"{self.path} has no file {name} in its manifest (it lists: {listed}). {fix_hint(self.path)}"
            )
        return self.path / name


def read_artifact(directory: Path, stage: str | None = None, fingerprint: str | None = None) -> Artifact:
    """Read the manifest of an artefact. If stage or fingerprint are given, check them. The payload is not checked.

    Raises:
        CorruptArtifact: The manifest is missing, damaged or of another artefact.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CorruptArtifact(
            f"{path} is missing{' or no file' if os.path.lexists(path) else ''}. {fix_hint(directory)}"
        )
    try:
        manifest = Manifest.from_json(json_text.content(path))
    except ValueError as error:
        raise CorruptArtifact(f"{path} is no valid manifest: {error}. {fix_hint(directory)}") from error
    for field, got, expected in (("stage", manifest.stage, stage), ("fingerprint", manifest.fingerprint, fingerprint)):
        if expected is not None and got != expected:
            raise CorruptArtifact(
                f"{path}: {field} is {got}, expected {expected} for this folder. {fix_hint(directory)}"
            )
    return Artifact(directory, manifest)


def verify_payload(artifact: Artifact, present: set[str]) -> None:
    """Check size and SHA-256 of every payload file.

    Args:
        artifact: The artefact.
        present: Names of the files in its folder.

    Raises:
        CorruptArtifact: A file is missing, changed or not listed in the manifest.
    """
    for name, entry in artifact.manifest.files.items():
        path = artifact.path / name
        if name not in present or path.is_symlink() or not path.is_file():
            fault = "is missing or no regular file"
        elif (size := path.stat().st_size) != entry["size"]:
            fault = f"has {size} bytes, its manifest says {entry['size']}"
        elif (found := sha256_file(path)) != entry["sha256"]:
            fault = f"has SHA-256 {found[:12]}..., its manifest says {entry['sha256'][:12]}..."
        else:
            continue
        raise CorruptArtifact(f"{path} {fault}. {fix_hint(artifact.path)}")
    if extra := sorted(present - artifact.manifest.files.keys()):
        raise CorruptArtifact(f"{artifact.path / extra[0]} is not listed in the manifest. {fix_hint(artifact.path)}")


def payload(directory: Path, without_work: bool = False) -> Iterator[str]:
    """Yield the relative names of an artefact's files, except the manifest, in a fixed order. Empty folders are ignored.

    Args:
        directory: Folder of the artefact, or its `.partial`.
        without_work: Leave out the folder `work` and the file `work.json`.
    """
    for folder, subfolders, files in os.walk(directory, onerror=_raise):
        top = folder == os.fspath(directory)
        if top and without_work and WORK in subfolders:
            subfolders.remove(WORK)
        subfolders.sort()
        for name in sorted(files) + [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:
            if not (top and (name == MANIFEST or (without_work and name == BEGUN))):
                yield Path(folder, name).relative_to(directory).as_posix()


def _raise(error: OSError) -> None:
    raise error


def fix_hint(path: Path) -> str:
    """Return the end of an error message that says how to remove a damaged artefact."""
    quoted = "'" + str(path).replace("'", "'\"'\"'") + "'"
    return f"Delete it (rm -r {quoted}) and run the same command again; `yolo-compress gc` removes what no recipe needs"


def is_inside(name: str) -> bool:
    """Return whether a file name of a manifest is relative, stays inside the folder, and is in normal form."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and str(path) == name
        and "\0" not in name
    )
