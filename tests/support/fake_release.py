"""The bundles and the robot of the kill loop in `fake_chain.py`, and what a kill must not change in them.

`bundle` runs as usual, but with a tiny model and without detections in its golden images. The robot's `switch.py` runs as usual;
`build.py` and `bench.py` of its bundles need no engine library.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from yolo_compress.bundle import golden, make
from yolo_compress.bundle.keys import keygen, read_seed
from yolo_compress.files.atomic import TEMPORARY
from yolo_compress.runtime.commands import switch as robot_switch
from yolo_compress.runtime.secure import ed25519, signed_manifest
from yolo_compress.runtime.secure.slots import NAMES, Slots, SlotsBusy
from yolo_compress.runtime.secure.unpack import unpack

KEY = "robot.key"
KEPT = 5  # bundles that the loop does not delete
SIZE = 30_000  # bytes of a robot's model, and of a golden image
BUILD = """
import time
from pathlib import Path
slot = Path(__file__).parent
model, engine = (slot / "onnx/fp32.onnx").read_bytes()[::-1], slot / "engines/x/engine.bin"
time.sleep(0.01)
engine.parent.mkdir(parents=True)
with engine.open("wb", 0) as stream:
    for at in range(0, len(model), 3_000):
        stream.write(model[at : at + 3_000])
        time.sleep(0.002)
"""
BENCH = """
from pathlib import Path
slot = Path(__file__).parent
built = (slot / "engines/x/engine.bin").read_bytes()
raise SystemExit(built[::-1] != (slot / "onnx/fp32.onnx").read_bytes())
"""


def onnx_model(note: bytes, imgsz_hw: tuple[int, int]) -> bytes:
    """An ONNX file of one class that computes nothing, with `note` in it."""
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, *imgsz_hw])
    given = helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 5, 84])
    graph = helper.make_graph([], "g", [taken], [given], doc_string=note.hex())
    return bytes(helper.make_model(graph).SerializeToString())


@contextmanager
def small_bundles() -> Iterator[None]:
    """Replace the golden images of `bundle` by random bytes."""

    def write(folder: Path, dataset: Any, export: Any, engines: Any, count: int) -> dict[str, Any]:
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.npy").write_bytes(os.urandom(SIZE))
        (folder / "golden.json").write_text("{}\n")
        return {"images": count}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden, "write", write)
        yield


@dataclass(frozen=True)
class Ran:
    """State of a robot's slots.

    Attributes:
        marks: Version in each slot that passed its checks; None: the slot has not passed.
        slot: The slot that `current` leads to.
        version: The version in it.
        newest: The highest version that ever ran.
    """

    marks: dict[str, int | None]
    slot: str | None
    version: int | None
    newest: int

    @property
    def waits(self) -> int | None:
        """Version in the other slot."""
        return self.marks["b" if self.slot == "a" else "a"]


@dataclass
class Release:
    """Bundles and a robot in a working folder.

    Attributes:
        whole: Digest of each bundle that was verified, by its name.
        ran: State of the robot at the last check.
    """

    folder: Path
    whole: dict[str, str] = field(default_factory=dict)
    ran: Ran = Ran({"a": None, "b": None}, None, None, 0)

    def __post_init__(self) -> None:
        self.bundles, self.shipped = self.folder / "bundles", self.folder / "shipped"
        self.slots = Slots(self.folder / "robot")
        for made in (self.bundles, self.shipped, self.folder / "warm"):
            made.mkdir()
        make.code(self.folder / "warm")
        keygen(self.folder / KEY)
        self.key = ed25519.public_key(read_seed(self.folder / KEY))

    def words(self, command: tuple[str, ...]) -> tuple[str, ...]:
        """Return a command with the names in braces replaced."""
        last = max(self.whole, key=_number, default="0")
        number = 1 + _number(last)
        last = last if self.whole else str(number)
        version = self.ran.newest + 1
        names = {"next": number, "last": last, "shipped": self._ship(version), "robot": self.slots.root}
        return tuple(word.format(**names) for word in command)

    def exit_code(self, words: tuple[str, ...]) -> int:
        """Run a command to its end, and return its exit code."""
        if words[0] == "bundle":
            return 2 if self._out(words).exists() else 0
        if words[0] == "switch.py" and words[1] in ("rollback", "switch"):
            runs, waits = self.ran.version, self.ran.waits
            there = runs is not None and waits is not None and (waits < runs) == (words[1] == "rollback")
            return 0 if there else 5
        return 0

    def check(self, words: tuple[str, ...], done: bool, exports: set[str]) -> None:
        """Assert the invariants of bundles and slots after a command.

        Args:
            words: The command.
            done: It ended with exit code 0.
            exports: SHA-256 of each model that the store ever held.
        """
        before = self.ran
        self._check_bundles(exports)
        self._check_robot(words)
        while self._busy():  # a build.py that still runs after its switch.py was killed
            time.sleep(0.01)
        self._check_robot(words)
        if done and words[0] == "bundle":
            assert not list(self.bundles.glob(f"{TEMPORARY}*")), f"{words} leaves temporary files"
        if done and words[:2] in (("switch.py", "rollback"), ("switch.py", "switch")):
            assert self.ran.version == before.waits
        if done and words[:2] == ("switch.py", "install"):
            assert Path(words[2]).stem == f"v{self.ran.version}"
            assert set(os.listdir(self.slots.root)) <= {"current", "lock", "slots", "state.json", "state.json.partial"}
            assert set(os.listdir(self.slots.root / "slots")) <= {"a", "b", "a.json", "b.json"}

    def _check_bundles(self, exports: set[str]) -> None:
        found = {path.name: path for path in self.bundles.iterdir() if not path.name.startswith(TEMPORARY)}
        assert set(self.whole) <= set(found), f"lost bundles {set(self.whole) - set(found)}"
        for name, path in found.items():
            if name not in self.whole:
                self._check_bundle(path, exports)
            digest = _digest(path)
            assert self.whole.setdefault(name, digest) == digest, f"bundle {name} is another one"
        for name in sorted(self.whole, key=_number)[:-KEPT]:  # so that the time of a check stays the same
            shutil.rmtree(found[name]) if found[name].is_dir() else found[name].unlink()
            del self.whole[name]

    def _check_bundle(self, path: Path, exports: set[str]) -> None:
        """Check that the bundle is complete and signed, and that its model was exported."""
        scratch = self.folder / "unpacked"
        manifest = signed_manifest.verify(path if path.is_dir() else unpack(path, scratch), self.key)
        shutil.rmtree(scratch, ignore_errors=True)
        assert manifest["version"] == _number(path.name)
        assert manifest["files"]["onnx/fp32.onnx"]["sha256"] in exports, f"{path}: its model was never exported"
        assert {"README.txt", "build.py", "runtime/secure/signed_manifest.py", "golden/golden.json"} <= set(
            manifest["files"]
        )

    def _check_robot(self, words: tuple[str, ...]) -> None:
        before, installs = self.ran, words[:2] == ("switch.py", "install")
        now = self._look()
        assert now.newest >= before.newest, "the newest version was forgotten"
        if words[0] != "switch.py" or words[1] == "status":
            assert now == before
        elif not installs:
            assert now.marks == before.marks, "a slot was lost without an installation"
            assert now.version in (before.version, before.waits)
        elif now.slot == before.slot:
            new = before.newest + 1
            assert now.version == before.version
            assert now.waits in (before.waits, new, None)
        else:
            assert now.version == before.newest + 1 and now.waits == before.version, "no way back"
        self.ran = now

    def _look(self) -> Ran:
        """Return the state of the slots. Check that each marked slot verifies and works, and that `current` leads to one."""
        marks: dict[str, int | None] = {}
        for name in NAMES:
            mark = self.slots.mark(name)
            marks[name] = mark and mark["version"]
            if mark:
                slot = self.slots.path(name)
                assert signed_manifest.verify(slot, self.key)["version"] == mark["version"]
                content = (slot / signed_manifest.MANIFEST).read_bytes()
                assert hashlib.sha256(content).hexdigest() == mark["manifest_sha256"]
                engine, model = slot / "engines/x/engine.bin", slot / "onnx/fp32.onnx"
                assert engine.read_bytes()[::-1] == model.read_bytes(), f"slot {name} has half an engine"
        current = self.slots.current()
        if current:
            assert marks[current], "current leads to a slot that has not passed"
            manifest = json.loads((self.slots.root / "current" / signed_manifest.MANIFEST).read_bytes())
            assert manifest["version"] == marks[current]
        return Ran(marks, current, marks[current] if current else None, self.slots.newest() or 0)

    def _busy(self) -> bool:
        try:
            with self.slots.locked():
                return False
        except SlotsBusy:
            return True

    def _ship(self, version: int) -> Path:
        """Return a bundle for the robot: a folder, or a tar for even versions."""
        folder = self.shipped / f"v{version}"
        shipped = folder.with_suffix(".tar") if version % 2 == 0 else folder
        if not folder.exists():
            (folder / "onnx").mkdir(parents=True)
            (folder / "onnx/fp32.onnx").write_bytes(os.urandom(SIZE))
            (folder / "build.py").write_text(BUILD)
            (folder / "bench.py").write_text(BENCH)
            signed_manifest.seal(folder, {"name": "r"}, version, read_seed(self.folder / KEY))
            if shipped != folder:
                with tarfile.open(shipped, "w") as archive:
                    archive.add(folder, folder.name)
        return shipped

    def _out(self, words: tuple[str, ...]) -> Path:
        return self.folder / next(word.removeprefix("out=") for word in words if word.startswith("out="))


def _number(name: str) -> int:
    """Return the version of a bundle, from its name."""
    return int(name.partition(".")[0])


def _digest(path: Path) -> str:
    """Return the digest of a file, or of all files of a folder with their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def switch(words: tuple[str, ...]) -> int:
    """Run `switch.py` as on the robot."""
    return robot_switch.main(words[1:])
