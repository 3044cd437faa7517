"""Two slots and the link `current` between them: whatever moment the power goes, `current` leads to a bundle that ran.

    ROOT/slots/a/       a bundle, with its engines
    ROOT/slots/a.json   written when a's engines had passed the golden frames: no slot without one is ever switched to
    ROOT/slots/b/ ...
    ROOT/current        -> slots/a; what the robot starts. Replaced by one rename
    ROOT/state.json     the newest version that was ever current, so that a roll-back opens no door to older bundles
    ROOT/incoming/      a bundle on its way in
    ROOT/lock           held while anything is changed

Only the slot that `current` does not lead to is written to, and its mark goes before its first byte does.
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
from .seal import BundleRefused, Manifest, written

ROOT = "/var/lib/yolo_compress"  # unless the variable or --root says otherwise
ROOT_VARIABLE = "YOLO_COMPRESS_ROOT"
NAMES = ("a", "b")
STATE_SCHEMA = 1


class _Passed(TypedDict):
    version: int
    manifest_sha256: str


class Mark(_Passed, total=False):
    """Which bundle a slot holds, written when its engines had passed."""

    name: Optional[str]


class State(TypedDict):
    """state.json."""

    schema: int
    newest: int  # version


class SlotsBusy(RuntimeFailure):
    """Another call holds the lock."""

    exit_code = 75


class Slots:
    """The folder of a robot's slots. Every write is whole and on the disk when the method returns.

    Args:
        root: made where it is not there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self._link = root / "current"
        self._state = root / "state.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one that changes anything.

        Raises:
            SlotsBusy: somebody else does.
        """
        os.makedirs(str(self.root / "slots"), exist_ok=True)
        with open(str(self.root / "lock"), "w", encoding="ascii") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise SlotsBusy(f"{self.root}: another switch.py is at work; try again when it is done") from error
            os.set_inheritable(held.fileno(), True)  # a child that outlives this process keeps the lock
            yield

    def path(self, name: str) -> Path:
        """Folder of a slot."""
        return self.root / "slots" / name

    def current(self) -> Optional[str]:
        """Name of the slot that runs; None before the first installation.

        Raises:
            EngineError: `current` is no link to a slot: not made here.
        """
        try:
            target = os.readlink(str(self._link))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EngineError(f"{self._link}: no link ({error.strerror}); remove it and install again") from error
        for name in NAMES:
            if target == f"slots/{name}":
                return name
        raise EngineError(
            f"{self._link}: leads to {target!r}, slots/a or slots/b expected; remove it and install again"
        )

    def idle(self) -> str:
        """Name of the slot that does not run."""
        return "b" if self.current() == "a" else "a"

    def mark(self, name: str) -> Optional[Mark]:
        """What was written when the slot passed; None where it has not."""
        found: Optional[Mark] = _read(self.path(name + ".json"), {"version": int, "manifest_sha256": str})
        return found

    def newest(self) -> Optional[int]:
        """The highest version that was ever current here; None before the first installation."""
        state: Optional[State] = _read(self._state, {"schema": int, "newest": int})
        current = self.current()
        mark = None if current is None else self.mark(current)
        if current is not None and mark is None:
            raise EngineError(f"{self.path(current)}.json: missing, though the slot is current; remove {self._link}")
        found = [state["newest"]] if state else []
        return max(found + ([mark["version"]] if mark else []), default=None)

    def product(self) -> Optional[str]:
        """Name of the bundle that runs; None before the first installation."""
        current = self.current()
        mark = None if current is None else self.mark(current)
        return None if mark is None else mark.get("name")

    def check_product(self, manifest: Manifest, bundle: Path) -> None:
        """One key may sign bundles of several products; a robot's slots hold those of one.

        Raises:
            BundleRefused: the manifest is of another name than the bundle that runs.
        """
        runs = self.product()
        if runs is not None and manifest.get("name") != runs:
            raise BundleRefused(
                f"{bundle}: of {manifest.get('name')!r}, but {self.root} runs {runs!r}; refused, another product needs another --root"
            )

    def clear_incoming(self) -> None:
        """Remove what an earlier call left there."""
        if os.path.lexists(str(self.incoming)):
            shutil.rmtree(str(self.incoming))

    def fill(self, name: str, bundle: Path) -> None:
        """Make a bundle, unpacked below `incoming`, the content of an idle slot. The slot loses its mark first."""
        if name == self.current():
            raise ValueError(f"slot {name} runs")
        mark = self.path(name + ".json")
        if mark.exists():
            os.unlink(str(mark))
            sync_folder(mark.parent)
        if self.path(name).exists():
            shutil.rmtree(str(self.path(name)))
        os.rename(str(bundle), str(self.path(name)))
        sync_folder(self.path(name).parent)

    def accept(self, name: str, mark: Mark) -> None:
        """Put a slot's engines on the disk, then its mark."""
        sync_tree(self.path(name))
        _write(self.path(name + ".json"), mark)

    def keep_newest(self, version: int) -> None:
        """Remember a version, before `current` leaves it."""
        _write(self._state, {"schema": STATE_SCHEMA, "newest": max(version, self.newest() or 0)})

    def switch(self, name: str) -> None:
        """Let `current` lead to a slot that has passed."""
        if self.mark(name) is None:
            raise ValueError(f"slot {name} has not passed")
        new = self.root / "current.new"
        if os.path.lexists(str(new)):
            os.unlink(str(new))
        os.symlink(f"slots/{name}", str(new))
        os.replace(str(new), str(self._link))
        sync_folder(self.root)


def sync_folder(path: Path) -> None:
    """Returns when the folder's entries are on the disk."""
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Returns when every file and folder below is on the disk."""
    for folder, _, files in os.walk(str(path)):
        for file in files:
            sync_folder(Path(folder) / file)
        sync_folder(Path(folder))


def _read(path: Path, wanted: Dict[str, type]) -> Any:
    """A small JSON object of ours that has the keys `wanted`, of these types; None where there is none.

    Raises:
        EngineError: it is damaged: every write here is whole, so somebody else was at it.
    """
    try:
        document = json_text.read(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EngineError(f"{path}: damaged ({error}); not written by switch.py, look before you remove it") from error
    if not isinstance(document, dict) or not all(type(document.get(key)) is kind for key, kind in wanted.items()):
        raise EngineError(f"{path}: {', '.join(wanted)} expected; not written by switch.py, look before you remove it")
    return document


def _write(path: Path, document: Union[Mark, State]) -> None:
    written(path, (json.dumps(document, sort_keys=True) + "\n").encode("utf-8"))
    sync_folder(path.parent)
