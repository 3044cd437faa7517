"""`python3 switch.py install BUNDLE | status | rollback | switch`: the next bundle into the idle slot, proved there, then one rename.

The verifying is done by the code that calls this, the installed one; only what has been verified is run. Engines are built and
checked by the new bundle's own `build.py` and `bench.py`, each in a process of its own: what will run is what is proved.

A version only rises: `install` takes a bundle that is newer than all that ever ran here. `rollback` goes to the older bundle in
the other slot, `switch` to the newer one; a second `rollback` finds nothing older and says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, TypedDict

from ..errors import EngineError, RuntimeFailure
from ..secure.seal import KEY_VARIABLE, MANIFEST, BundleRefused, pinned_key, verify
from ..secure.slots import NAMES, ROOT, ROOT_VARIABLE, Mark, Slots
from ..secure.unpack import unpack
from .common import Parser, answer, guarded, mapping

BUILD_SECONDS, HEALTH_SECONDS = 4 * 3600, 900  # an INT8 build of a large net takes an hour on a small Jetson

Step = Callable[[Path], None]


class Status(TypedDict):
    """What `status` prints, as JSON."""

    root: str  # folder of the slots
    current: Optional[str]  # slot that runs
    version: Optional[int]  # of its bundle
    newest: Optional[int]  # version that ever ran
    slots: Dict[str, Optional[Mark]]  # "a", "b" -> what passed there


class Unhealthy(RuntimeFailure):
    """A slot's engines could not be built or failed the golden frames; carries the exit code of what said so."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build(slot: Path) -> None:
    """Build the engines of a slot, by its own `build.py`.

    Raises:
        Unhealthy: it failed or took too long.
    """
    _run(slot, ["build.py"], BUILD_SECONDS)


def health(slot: Path) -> None:
    """The golden frames through every engine of a slot, by its own `bench.py`.

    Raises:
        Unhealthy: boxes or scores are not as in the manifest.
    """
    _run(slot, ["bench.py", "--golden"], HEALTH_SECONDS)


def _run(slot: Path, command: List[str], seconds: float) -> None:
    environment = dict(
        os.environ, PYTHONDONTWRITEBYTECODE="1"
    )  # a .pyc would be a file that the manifest does not know
    environment[ROOT_VARIABLE] = str(slot.parents[1])  # given as --root, perhaps
    if environment.get(KEY_VARIABLE):  # the child runs in another folder
        environment[KEY_VARIABLE] = os.path.abspath(environment[KEY_VARIABLE])
    words = [sys.executable, str(slot / command[0])] + command[1:]
    try:
        done = subprocess.run(
            words,
            cwd=str(slot),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            close_fds=False,  # the lock goes along: if this process is killed, the slot stays locked while the child writes to it
        )
    except subprocess.TimeoutExpired as error:
        raise Unhealthy(f"{slot / command[0]}: not done after {seconds:.0f} s; current stays as it is", 1) from error
    if done.returncode:
        end = done.stdout.decode("utf-8", "replace").strip()[-2000:]
        code = done.returncode if 0 < done.returncode < 8 else 1
        raise Unhealthy(f"{slot / command[0]}: exit code {done.returncode}; current stays as it is\n{end}", code)


def install(slots: Slots, bundle: Path, force: bool = False, build: Step = build, health: Step = health) -> Status:
    """Take a bundle in, prove it in the idle slot and switch to it.

    A call that was killed is repeated; where the same bundle runs already there is nothing to do.

    Args:
        bundle: folder or tar.
        force: take also a bundle whose gate had failed on the workstation.
        build, health: raise `Unhealthy`.

    Returns:
        What `status` does.

    Raises:
        BundleRefused: damaged, not signed by the pinned key, of another product than the one that runs, not newer than all
            that ever ran here, or of a failed gate.
        Unhealthy: its engines fail; what ran still runs.
        SlotsBusy, EngineError, OSError: see `Slots`.
    """
    with slots.locked():
        slots.clear_incoming()
        try:
            there = unpack(bundle, slots.incoming)
            manifest = verify(there, pinned_key())
            mark: Mark = {
                "name": manifest.get("name"),
                "version": manifest["version"],
                "manifest_sha256": _manifest_sha256(there),
            }
            slots.check_product(manifest, bundle)
            current = slots.current()
            if current is None or slots.mark(current) != mark:
                _check_newer(bundle, mark["version"], slots.newest())
                if not force and mapping(manifest, "gate", there / MANIFEST).get("passed") is False:
                    raise BundleRefused(f"{bundle}: its gate failed on the workstation; --force takes it all the same")
                _take(slots, there, mark, build, health)
        finally:
            slots.clear_incoming()
        return status(slots)


def _check_newer(bundle: Path, version: int, newest: Optional[int]) -> None:
    if newest is not None and version <= newest:
        raise BundleRefused(
            f"{bundle}: version {version}, above {newest} expected, the newest that ran here; make the bundle again "
            "with a higher version, or go back with rollback"
        )


def _take(slots: Slots, there: Path, mark: Mark, build: Step, health: Step) -> None:
    name = slots.idle()
    slots.fill(name, there)
    build(slots.path(name))
    _check(slots, name, mark, health)
    slots.accept(name, mark)
    slots.switch(name)


def _check(slots: Slots, name: str, mark: Mark, health: Step) -> None:
    """The slot holds what its mark says, unaltered, and it works."""
    verify(slots.path(name), pinned_key())
    if _manifest_sha256(slots.path(name)) != mark["manifest_sha256"]:
        raise BundleRefused(f"{slots.path(name)}: another bundle than the one that passed here; install it again")
    health(slots.path(name))


def _manifest_sha256(bundle: Path) -> str:
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def rollback(slots: Slots, health: Step = health) -> Status:
    """Go to the older bundle in the other slot, after a look at its health.

    Raises:
        EngineError: there is none (a roll-back already happened, or nothing was installed before).
        BundleRefused, Unhealthy: it does not work any more; what ran still runs.
    """
    return _other(slots, health, older=True)


def switch(slots: Slots, health: Step = health) -> Status:
    """Undo a roll-back: go to the newer bundle in the other slot. Raises as `rollback`."""
    return _other(slots, health, older=False)


def _other(slots: Slots, health: Step, older: bool) -> Status:
    with slots.locked():
        current, other = slots.current(), slots.idle()
        runs, waits = None if current is None else slots.mark(current), slots.mark(other)
        if runs is None:
            raise EngineError(f"{slots.root}: nothing is installed; switch.py install BUNDLE")
        if waits is None or (waits["version"] < runs["version"]) != older:
            there = "holds nothing that passed" if waits is None else f"holds version {waits['version']}"
            raise EngineError(
                f"{slots.root}: version {runs['version']} runs and slot {other} {there}: nothing "
                f"{'older to roll back' if older else 'newer to switch'} to"
            )
        _check(slots, other, waits, health)
        slots.keep_newest(runs["version"])
        slots.switch(other)
        return status(slots)


def status(slots: Slots) -> Status:
    """What runs, and what waits in the other slot."""
    current = slots.current()
    marks = {name: slots.mark(name) for name in NAMES}
    runs = None if current is None else marks[current]
    return {
        "root": str(slots.root),
        "current": current,
        "version": None if runs is None else runs["version"],
        "newest": slots.newest(),
        "slots": marks,
    }


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; the last line of stdout is one JSON document. Exit codes as the package's."""
    parser = Parser(prog="switch.py", description="Install, roll back and show this robot's bundles.")
    parser.add_argument("--root", default=os.environ.get(ROOT_VARIABLE, ROOT), help="folder of the slots (%(default)s)")
    commands = parser.add_subparsers(dest="command", metavar="install|status|rollback|switch")
    commands.required = True
    taking = commands.add_parser("install", help="verify, build, check, switch")
    taking.add_argument("bundle", help="folder or tar")
    taking.add_argument("--force", action="store_true", help="also a bundle whose gate had failed")
    commands.add_parser("status", help="what runs, and what waits in the other slot")
    commands.add_parser("rollback", help="to the older bundle in the other slot")
    commands.add_parser("switch", help="to the newer bundle in the other slot, after a roll-back")
    for command in commands.choices.values():
        command.add_argument("--root", default=argparse.SUPPRESS, help="as above")
    given = parser.parse_args(argv)
    slots = Slots(Path(given.root).absolute())  # commands run in a folder of their own

    def action() -> int:
        if given.command == "install":
            found = install(slots, Path(given.bundle), given.force)
        else:
            found = {"status": status, "rollback": rollback, "switch": switch}[given.command](slots)
        for name, mark in found["slots"].items():
            what = "empty" if mark is None else f"{mark['name']} version {mark['version']}"
            answer(f"{'->' if name == found['current'] else '  '} {name}  {what}")
        answer(json.dumps(found))
        return 0

    return guarded(action)
