"""Two slots for bundles, and the link `current` to the slot in use. After a power loss, `current` still leads to a tested bundle.

    ROOT/slots/a/       a bundle, with its engines
    ROOT/slots/a.json   mark of slot a, written after its engines passed the golden images. A slot without a mark is never used
    ROOT/slots/b/ ...
    ROOT/current        -> slots/a, the bundle that the robot starts. Replaced by one rename
    ROOT/state.json     the newest version that was ever current. After a roll-back, older bundles are still refused
    ROOT/incoming/      a bundle that is being unpacked
    ROOT/lock           locked during every change

Only the slot that is not in use is written to. Its mark is removed first.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, TypedDict, Union

from .. import json_text
from ..errors import EngineError, RuntimeFailure
from .signed_manifest import BundleRefused, Manifest, written

ROOT = "/var/lib/yolo_compress"  # default; the variable below or --root override it
ROOT_VARIABLE = "YOLO_COMPRESS_ROOT"
NAMES = ("a", "b")
STATE_SCHEMA = 1


class _Passed(TypedDict):
    version: int
    manifest_sha256: str


class Mark(_Passed, total=False):
    """Identity of the bundle in a slot, written after its engines passed the golden images."""

    name: Optional[str]


class State(TypedDict):
    """The document in state.json."""

    schema: int
    newest: int  # newest version that was ever current


class SlotsBusy(RuntimeFailure):
    """Another process holds the lock."""

    exit_code = 75


class Slots:
    """The folder of a robot's two slots. Every write is atomic, and is on the disk when the method returns.

    Args:
        root: the folder. `locked` creates the folder if it does not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self._link = root / "current"
        self._state = root / "state.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the slots during a `with` block. Every change of a slot needs the lock.

        Raises:
            SlotsBusy: another process holds the lock.
        """
        os.makedirs(str(self.root / "slots"), exist_ok=True)
        with open(str(self.root / "lock"), "w", encoding="ascii") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise SlotsBusy(f"{self.root}: another switch.py is running; try again when it is done") from error
            os.set_inheritable(held.fileno(), True)  # a child that outlives this process holds the lock
            yield

    def path(self, name: str) -> Path:
        """Return the folder of a slot."""
        return self.root / "slots" / name

    def current(self) -> Optional[str]:
        """Return the name of the slot in use. None: nothing was installed yet.

        Raises:
            EngineError: `current` is not a link to a slot, so `switch.py` did not make it.
        """
        try:
            target = os.readlink(str(self._link))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EngineError(f"{self._link}: not a link ({error.strerror}); remove it and install again") from error
        for name in NAMES:
            if target == f"slots/{name}":
                return name
        raise EngineError(
            f"{self._link}: leads to {target!r}, expected slots/a or slots/b; remove it and install again"
        )

    def idle(self) -> str:
        """Return the name of the slot that is not in use."""
        return "b" if self.current() == "a" else "a"

    def mark(self, name: str) -> Optional[Mark]:
        """Return the mark of a slot. None: its engines have not passed the golden images."""
        mark: Optional[Mark] = _read(self.path(name + ".json"), {"version": int, "manifest_sha256": str})
        return mark

    def newest(self) -> Optional[int]:
        """Return the highest version that was ever current. None: nothing was installed yet.

        Raises:
            EngineError: a file is damaged, or the slot in use has no mark.
        """
        state: Optional[State] = _read(self._state, {"schema": int, "newest": int})
        current = self.current()
        mark = None if current is None else self.mark(current)
        if current is not None and mark is None:
            raise EngineError(f"{self.path(current)}.json: missing, though the slot is current; remove {self._link}")
        versions = ([state["newest"]] if state else []) + ([mark["version"]] if mark else [])
        return max(versions, default=None)

    def product(self) -> Optional[str]:
        """Return the name of the bundle in use. None: nothing was installed yet."""
        current = self.current()
        mark = None if current is None else self.mark(current)
        return None if mark is None else mark.get("name")

    def check_product(self, manifest: Manifest, bundle: Path) -> None:
        """Check that a bundle has the same name (product) as the bundle in use. One key may sign bundles of several products.

        Raises:
            BundleRefused: the bundle has another name than the bundle in use.
        """
        product = self.product()
        if product is not None and manifest.get("name") != product:
            raise BundleRefused(
                f"{bundle}: of {manifest.get('name')!r}, but {self.root} is of {product!r}; refused, other products need another --root"
            )

    def clear_incoming(self) -> None:
        """Remove the files that an earlier call left in `incoming`."""
        if os.path.lexists(str(self.incoming)):
            shutil.rmtree(str(self.incoming))

    def fill(self, name: str, bundle: Path) -> None:
        """Move a bundle that was unpacked below `incoming` into an idle slot. The mark of the slot is removed first."""
        if name == self.current():
            raise ValueError(f"slot {name} is in use")
        mark = self.path(name + ".json")
        if mark.exists():
            os.unlink(str(mark))
            sync_folder(mark.parent)
        if self.path(name).exists():
            shutil.rmtree(str(self.path(name)))
        os.rename(str(bundle), str(self.path(name)))
        sync_folder(self.path(name).parent)

    def accept(self, name: str, mark: Mark) -> None:
        """Sync a slot's files to the disk, then write its mark."""
        sync_tree(self.path(name))
        _write(self.path(name + ".json"), mark)

    def keep_newest(self, version: int) -> None:
        """Record a version in state.json, before `current` changes to an older one."""
        _write(self._state, {"schema": STATE_SCHEMA, "newest": max(version, self.newest() or 0)})

    def switch(self, name: str) -> None:
        """Point `current` to a slot whose engines passed the golden images."""
        if self.mark(name) is None:
            raise ValueError(f"slot {name} has no mark")
        new = self.root / "current.new"
        if os.path.lexists(str(new)):
            os.unlink(str(new))
        os.symlink(f"slots/{name}", str(new))
        os.replace(str(new), str(self._link))
        sync_folder(self.root)


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to the disk."""
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Sync every file and folder below a folder to the disk."""
    for folder, _, files in os.walk(str(path)):
        for file in files:
            sync_folder(Path(folder) / file)
        sync_folder(Path(folder))


def _read(path: Path, wanted: Dict[str, type]) -> Any:
    """Read a JSON object that this module wrote. None: the file does not exist.

    Args:
        wanted: required key -> its type.

    Raises:
        EngineError: the file is damaged. Writes here are atomic, so another program changed it.
    """
    try:
        document = json_text.read(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EngineError(f"{path}: damaged ({error}); not written by switch.py, look before you remove it") from error
    if not isinstance(document, dict) or not all(type(document.get(key)) is kind for key, kind in wanted.items()):
        raise EngineError(f"{path}: expected {', '.join(wanted)}; not written by switch.py, look before you remove it")
    return document


def _write(path: Path, document: Union[Mark, State]) -> None:
    written(path, (json.dumps(document, sort_keys=True) + "\n").encode("utf-8"))
    sync_folder(path.parent)
