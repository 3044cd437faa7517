"""What vouches for an artefact: the manifest beside the payload, and the check of one against the other."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from yolo_compress.errors import CorruptArtifact
from yolo_compress.runtime import json_text
from yolo_compress.runtime.files import FileEntry
from yolo_compress.store.environment import Environment
from yolo_compress.store.fingerprint import canonical, fingerprint

SCHEMA = 2
MANIFEST = "manifest.json"
WORK = "work"
BEGUN = "work.json"  # beside `work`: the content of the inputs that it was begun from


@dataclass(frozen=True)
class Manifest:
    """The record that makes a directory an artefact.

    `key` is the mapping that was hashed to `fingerprint`; `files` maps each payload file (relative, `/`) to
    its entry; `inputs` maps each input's name in the key to the `content` of the artefact that was
    read; `seconds` is the time the stage took; `created` is ISO 8601 in UTC, for people only.
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
        """SHA-256, hex, of what later stages read: the payload and the metrics. The same key can give another content."""
        return hashlib.sha256(canonical({"files": self.files, "metrics": self.metrics}).encode()).hexdigest()

    def to_json(self) -> str:
        """Text of the manifest with a checksum over all of it, so that a flipped digit in a metric is noticed too.

        Raises:
            ValueError: NaN or infinity in a metric.
        """
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        checksum = hashlib.sha256(canonical(content).encode()).hexdigest()
        return json.dumps({**content, "checksum": checksum}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Inverse of `to_json`; also reads schema 1, which did not record `inputs`: a stage with inputs is then stale.

        Raises:
            ValueError: no manifest, of another schema, not as written, or with a file name that leaves the folder.
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
                raise ValueError(f"{field} is no object")
        if fingerprint(self.key) != self.fingerprint:
            raise ValueError("its fingerprint is not that of its key")
        for name, entry in self.files.items():
            if not is_inside(name) or name == MANIFEST:
                raise ValueError(f"lists the file {name!r}, which is not inside its folder")
            if not isinstance(entry, dict) or [type(entry.get(key)) for key in ("sha256", "size")] != [str, int]:
                raise ValueError(f"entry of {name!r} lacks sha256 or size")


@dataclass(frozen=True)
class Artifact:
    """A published directory, as `run` gives it; its files never change.

    Attributes:
        path: of the directory, in the store.
        manifest: what vouches for it.
    """

    path: Path
    manifest: Manifest

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return self.manifest.stage

    @property
    def fingerprint(self) -> str:
        """SHA-256, hex, of everything that decides its content."""
        return self.manifest.fingerprint

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured; the unit is in the name (`..._ms`, `..._mib`), mAP is a fraction from 0 to 1."""
        return self.manifest.metrics

    def file(self, name: str) -> Path:
        """Path of a payload file.

        Args:
            name: relative to `path`, as in `model.pt` or `compressed/int8.onnx`.

        Raises:
            CorruptArtifact: the manifest does not vouch for such a file.
        """
        if name not in self.manifest.files:
            there = ", ".join(sorted(self.manifest.files)) or "none"
            raise CorruptArtifact(
                f"{self.path} has no file {name} in its manifest (it lists: {there}). {mend(self.path)}"
            )
        return self.path / name


def read_artifact(directory: Path, stage: str, fingerprint: str | None = None) -> Artifact:
    path = directory / MANIFEST
    if not path.is_file():
        raise CorruptArtifact(f"{path} is missing{' or no file' if os.path.lexists(path) else ''}. {mend(directory)}")
    try:
        manifest = Manifest.from_json(json_text.content(path))
    except ValueError as error:
        raise CorruptArtifact(f"{path} is no sound manifest: {error}. {mend(directory)}") from error
    for field, got, expected in (("stage", manifest.stage, stage), ("fingerprint", manifest.fingerprint, fingerprint)):
        if expected is not None and got != expected:
            raise CorruptArtifact(f"{path}: {field} is {got}, its place is that of {expected}. {mend(directory)}")
    return Artifact(directory, manifest)


def verify_payload(artifact: Artifact, there: set[str]) -> None:
    for name, entry in artifact.manifest.files.items():
        path = artifact.path / name
        if name not in there or path.is_symlink() or not path.is_file():
            fault = "is missing or no regular file"
        elif (size := path.stat().st_size) != entry["size"]:
            fault = f"has {size} bytes, its manifest says {entry['size']}"
        elif (found := sha256_file(path)) != entry["sha256"]:
            fault = f"has SHA-256 {found[:12]}..., its manifest says {entry['sha256'][:12]}..."
        else:
            continue
        raise CorruptArtifact(f"{path} {fault}. {mend(artifact.path)}")
    if extra := sorted(there - artifact.manifest.files.keys()):
        raise CorruptArtifact(f"{artifact.path / extra[0]} is not listed in the manifest. {mend(artifact.path)}")


def payload(directory: Path, without_work: bool = False) -> Iterator[str]:
    """Relative names of all files but the manifest, sorted; directories alone do not count. `work` includes `work.json`."""
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


def mend(path: Path) -> str:
    quoted = "'" + str(path).replace("'", "'\"'\"'") + "'"
    return f"Delete it (rm -r {quoted}) and run the same command again; `yolo-compress gc` drops what no recipe needs"


def is_inside(name: str) -> bool:
    """Whether a manifest's file name stays inside its folder, in the one spelling `publish` would give it."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and str(path) == name
        and "\0" not in name
    )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file of any size, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
