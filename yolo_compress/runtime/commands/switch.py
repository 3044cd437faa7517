"""`python3 switch.py install BUNDLE | status | rollback | switch`: install bundles in two slots and switch between them.

`install` copies a bundle to the idle slot, verifies it, builds and tests its engines, and switches to it by one rename. The
installed code verifies the new bundle before any code of it runs. Then the new bundle's own `build.py` and `bench.py` build and
test the engines, each in its own process. So the test covers the code that will run.

`install` accepts only a version that is newer than all versions that ever ran here. `rollback` goes to the other slot if its bundle
is older. `switch` goes there if its bundle is newer. A second `rollback` is an error, because no older bundle is left.
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
from ..secure.signed_manifest import KEY_VARIABLE, MANIFEST, BundleRefused, pinned_key, verify
from ..secure.slots import NAMES, ROOT, ROOT_VARIABLE, Mark, Slots
from ..secure.unpack import unpack
from .bundle import mapping
from .command_line import Parser, answer, run_command

BUILD_SECONDS, HEALTH_SECONDS = 4 * 3600, 900  # an INT8 build of a large model takes an hour on a small Jetson

Step = Callable[[Path], None]


class Status(TypedDict):
    """The JSON document that `status` prints."""

    root: str  # folder of the slots
    current: Optional[str]  # name of the slot in use
    version: Optional[int]  # version of the bundle in use
    newest: Optional[int]  # newest version that ever ran
    slots: Dict[str, Optional[Mark]]  # "a", "b" -> the bundle that passed its tests there


class Unhealthy(RuntimeFailure):
    """The engines of a slot could not be built, or their detections in the golden images differ from the expected detections.

    The exit code is the exit code of the failed command.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build(slot: Path) -> None:
    """Build the engines of a slot with the slot's own `build.py`.

    Raises:
        Unhealthy: the build failed or took too long.
    """
    _run(slot, ["build.py"], BUILD_SECONDS)


def health(slot: Path) -> None:
    """Test every engine of a slot on the golden images with the slot's own `bench.py`.

    Raises:
        Unhealthy: boxes or scores differ from the expected values by more than the tolerance.
    """
    _run(slot, ["bench.py", "--golden"], HEALTH_SECONDS)


def _run(slot: Path, command: List[str], seconds: float) -> None:
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")  # a .pyc is not in the manifest
    environment[ROOT_VARIABLE] = str(slot.parents[1])  # --root may have set another folder than the environment
    if environment.get(KEY_VARIABLE):  # the child runs in another folder
        environment[KEY_VARIABLE] = os.path.abspath(environment[KEY_VARIABLE])
    arguments = [sys.executable, str(slot / command[0])] + command[1:]
    try:
        done = subprocess.run(
            arguments,
            cwd=str(slot),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            close_fds=False,  # the child inherits the lock: if this process is killed, the slot stays locked while the child writes
        )
    except subprocess.TimeoutExpired as error:
        raise Unhealthy(
            f"{slot / command[0]}: not finished after {seconds:.0f} s; the current slot is unchanged", 1
        ) from error
    if done.returncode:
        output_end = done.stdout.decode("utf-8", "replace").strip()[-2000:]
        code = done.returncode if 0 < done.returncode < 8 else 1
        raise Unhealthy(
            f"{slot / command[0]}: exit code {done.returncode}; the current slot is unchanged\n{output_end}", code
        )


def install(slots: Slots, bundle: Path, force: bool = False, build: Step = build, health: Step = health) -> Status:
    """Copy a bundle to the idle slot, test it there and switch to it.

    If a call is killed, call it again. If the same bundle is already in use, nothing is done.

    Args:
        bundle: folder or tar.
        force: install the bundle even if its gate failed: the limits for the compressed model's accuracy and latency.
        build, health: functions that build and test the engines of a slot, or raise `Unhealthy`.

    Returns:
        The status after the installation, as `status` returns it.

    Raises:
        BundleRefused: the bundle is damaged, is not signed by the pinned key, has another name than the bundle in use, is not newer
            than all versions that ever ran here, or failed its gate.
        Unhealthy: the engines cannot be built or fail the test on the golden images. The current slot is unchanged.
        SlotsBusy, EngineError, OSError: a method of `Slots` failed.
    """
    with slots.locked():
        slots.clear_incoming()
        try:
            unpacked = unpack(bundle, slots.incoming)
            manifest = verify(unpacked, pinned_key())
            mark: Mark = {
                "name": manifest.get("name"),
                "version": manifest["version"],
                "manifest_sha256": _manifest_sha256(unpacked),
            }
            slots.check_product(manifest, bundle)
            current = slots.current()
            if current is None or slots.mark(current) != mark:
                _check_newer(bundle, mark["version"], slots.newest())
                if not force and mapping(manifest, "gate", unpacked / MANIFEST).get("passed") is False:
                    raise BundleRefused(f"{bundle}: its gate failed on the workstation; --force installs it anyway")
                _test_and_switch(slots, unpacked, mark, build, health)
        finally:
            slots.clear_incoming()
        return status(slots)


def _check_newer(bundle: Path, version: int, newest: Optional[int]) -> None:
    if newest is not None and version <= newest:
        raise BundleRefused(
            f"{bundle}: version {version}, expected one above {newest} (the newest version that ran here); make the bundle again "
            "with a higher version, or use rollback"
        )


def _test_and_switch(slots: Slots, unpacked: Path, mark: Mark, build: Step, health: Step) -> None:
    name = slots.idle()
    slots.fill(name, unpacked)
    build(slots.path(name))
    _check(slots, name, mark, health)
    slots.accept(name, mark)
    slots.switch(name)


def _check(slots: Slots, name: str, mark: Mark, health: Step) -> None:
    """Check that a slot holds the bundle of its `mark`, without altered files, and that its engines pass the self-test."""
    verify(slots.path(name), pinned_key())
    if _manifest_sha256(slots.path(name)) != mark["manifest_sha256"]:
        raise BundleRefused(f"{slots.path(name)}: not the bundle that was tested here; install it again")
    health(slots.path(name))


def _manifest_sha256(bundle: Path) -> str:
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def rollback(slots: Slots, health: Step = health) -> Status:
    """Go back to the older bundle in the other slot, after another self-test.

    Raises:
        EngineError: there is no older bundle, because of an earlier roll-back or because only one bundle was installed.
        BundleRefused, Unhealthy: the older bundle fails its test. The current slot is unchanged.
    """
    return _switch_to_other(slots, health, older=True)


def switch(slots: Slots, health: Step = health) -> Status:
    """Undo a roll-back: go to the newer bundle in the other slot, after another self-test. Raises the errors of `rollback`."""
    return _switch_to_other(slots, health, older=False)


def _switch_to_other(slots: Slots, health: Step, older: bool) -> Status:
    with slots.locked():
        current, other = slots.current(), slots.idle()
        current_mark, other_mark = None if current is None else slots.mark(current), slots.mark(other)
        if current_mark is None:
            raise EngineError(f"{slots.root}: nothing is installed; switch.py install BUNDLE")
        if other_mark is None or (other_mark["version"] < current_mark["version"]) != older:
            content = "holds no tested bundle" if other_mark is None else f"holds version {other_mark['version']}"
            raise EngineError(
                f"{slots.root}: version {current_mark['version']} is in use and slot {other} {content}: nothing "
                f"{'older to roll back' if older else 'newer to switch'} to"
            )
        _check(slots, other, other_mark, health)
        slots.keep_newest(current_mark["version"])
        slots.switch(other)
        return status(slots)


def status(slots: Slots) -> Status:
    """Return the name of the slot in use, and the bundles in both slots."""
    current = slots.current()
    marks = {name: slots.mark(name) for name in NAMES}
    current_mark = None if current is None else marks[current]
    return {
        "root": str(slots.root),
        "current": current,
        "version": None if current_mark is None else current_mark["version"],
        "newest": slots.newest(),
        "slots": marks,
    }


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code. The last line of stdout is a JSON document of type `Status`."""
    parser = Parser(prog="switch.py", description="Install, roll back and show this robot's bundles.")
    parser.add_argument("--root", default=os.environ.get(ROOT_VARIABLE, ROOT), help="folder of the slots (%(default)s)")
    commands = parser.add_subparsers(dest="command", metavar="install|status|rollback|switch")
    commands.required = True
    taking = commands.add_parser("install", help="verify, build, check, switch")
    taking.add_argument("bundle", help="folder or tar")
    taking.add_argument("--force", action="store_true", help="install the bundle even if its gate failed")
    commands.add_parser("status", help="show which slot is in use and what both hold")
    commands.add_parser("rollback", help="switch to the older bundle in the other slot")
    commands.add_parser("switch", help="switch to the newer bundle in the other slot, after a roll-back")
    for command in commands.choices.values():
        command.add_argument("--root", default=argparse.SUPPRESS, help="as above")
    given = parser.parse_args(argv)
    slots = Slots(Path(given.root).absolute())  # absolute, because child processes run in another folder

    def action() -> int:
        if given.command == "install":
            result = install(slots, Path(given.bundle), given.force)
        else:
            result = {"status": status, "rollback": rollback, "switch": switch}[given.command](slots)
        for name, mark in result["slots"].items():
            content = "empty" if mark is None else f"{mark['name']} version {mark['version']}"
            answer(f"{'->' if name == result['current'] else '  '} {name}  {content}")
        answer(json.dumps(result))
        return 0

    return run_command(action)
