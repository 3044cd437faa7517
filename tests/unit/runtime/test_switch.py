"""The two slots of a robot: killed at every step of the file system, `current` still leads to a bundle that works."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.typed import validate
from yolo_compress.runtime.commands import switch as robot_switch
from yolo_compress.runtime.commands.switch import Status, Unhealthy, install, rollback, status, switch
from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.secure import ed25519, signed_manifest
from yolo_compress.runtime.secure.signed_manifest import BundleRefused
from yolo_compress.runtime.secure.slots import Slots, SlotsBusy
from yolo_compress.runtime.secure.unpack import unpack

SEED = b"\x07" * 32
KILLED = 137


@pytest.fixture(autouse=True)
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A robot with a pinned key."""
    (tmp_path / "bundle.pub").write_text(ed25519.public_key(SEED).hex())
    monkeypatch.setenv(signed_manifest.KEY_VARIABLE, str(tmp_path / "bundle.pub"))


def make_bundle(at: Path, version: int, seed: bytes | None = SEED, **about: Any) -> Path:
    (at / "onnx").mkdir(parents=True, exist_ok=True)
    (at / "onnx" / "fp32.onnx").write_bytes(b"net %d" % version)
    (at / "build.py").write_text("pass\n")
    signed_manifest.seal(at, {"name": "demo", **about}, version, seed)
    return at


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The file system takes a part of a larger file and then says no, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def fake_build(slot: Path) -> None:
    """An engine that is the ONNX backwards, in two writes."""
    (slot / "engines" / "x").mkdir(parents=True)
    data = (slot / "onnx" / "fp32.onnx").read_bytes()[::-1]
    for name, part in (("engine.bin", data), ("engine.json", b"{}")):
        descriptor = os.open(slot / "engines" / "x" / name, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, part)
        os.close(descriptor)


def fake_health(slot: Path) -> None:
    built = slot / "engines" / "x" / "engine.bin"
    if not built.exists() or built.read_bytes()[::-1] != (slot / "onnx" / "fp32.onnx").read_bytes():
        raise Unhealthy(f"{slot}: golden frames differ", 1)


def put(slots: Slots, bundle: Path, **changes: Any) -> dict[str, Any]:
    return install(slots, bundle, **{"build": fake_build, "health": fake_health, **changes})


def running(slots: Slots) -> int:
    """Version behind `current`, which has to verify and to pass."""
    target = slots.root / "current"
    manifest = signed_manifest.verify(target, signed_manifest.pinned_key())
    fake_health(target)
    return int(manifest["version"])


# The ways in


def test_a_bundle_goes_in_and_the_next_into_the_other_slot(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    assert status(slots)["current"] is None
    first = put(slots, make_bundle(tmp_path / "1", 1))
    assert (first["current"], first["version"], running(slots)) == ("a", 1, 1)
    second = put(slots, make_bundle(tmp_path / "2", 2))
    assert (second["current"], second["version"], second["newest"], running(slots)) == ("b", 2, 2, 2)
    assert sorted(os.listdir(slots.root)) == ["current", "lock", "slots"]
    third = put(slots, make_bundle(tmp_path / "3", 3))
    assert (third["current"], {name: mark["version"] for name, mark in third["slots"].items()}) == (
        "a",
        {"a": 3, "b": 2},
    )


def test_the_same_bundle_again_is_nothing_to_do(tmp_path: Path) -> None:
    slots, bundle = Slots(tmp_path / "root"), make_bundle(tmp_path / "1", 1)
    before = put(slots, bundle)
    assert put(slots, bundle, build=lambda slot: pytest.fail("built again")) == before


@pytest.mark.fault(30)
@pytest.mark.parametrize("version", [1, 2])
def test_only_a_newer_version_comes_in(tmp_path: Path, version: int) -> None:
    slots = Slots(tmp_path / "root")
    put(slots, make_bundle(tmp_path / "1", 2))
    with pytest.raises(BundleRefused, match="expected one above 2"):
        put(slots, make_bundle(tmp_path / "2", version, other=True))
    assert running(slots) == 2


def test_a_key_named_from_here_is_found_by_the_slots_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(signed_manifest.KEY_VARIABLE, "bundle.pub")
    (tmp_path / "slot").mkdir()
    (tmp_path / "slot" / "build.py").write_text(f"import os\nopen(os.environ[{signed_manifest.KEY_VARIABLE!r}])\n")
    robot_switch.build(tmp_path / "slot")


def test_a_gate_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleRefused, match="gate is None, expected a JSON object"):
        put(Slots(tmp_path / "root"), make_bundle(tmp_path / "1", 1, gate=None))


@pytest.mark.fault(85)
def test_one_key_of_two_products_installs_neither_over_the_other(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    put(slots, make_bundle(tmp_path / "forklift", 100, name="forklift"))
    mower = make_bundle(tmp_path / "mower", 101, name="lawnmower")
    with pytest.raises(BundleRefused, match=r"of 'lawnmower', but .* is of 'forklift'; .* another --root"):
        put(slots, mower, build=lambda slot: pytest.fail("it was run"))
    validate(status(slots), Status)
    assert running(slots) == 100 and status(slots)["slots"]["b"] is None
    assert put(Slots(tmp_path / "other"), mower)["version"] == 101
    assert put(slots, make_bundle(tmp_path / "next", 101, name="forklift"))["version"] == 101


def test_a_full_disk_leaves_what_runs(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    put(slots, make_bundle(tmp_path / "1", 1))
    (tmp_path / "2" / "onnx").mkdir(parents=True)
    (tmp_path / "2" / "onnx" / "large.onnx").write_bytes(bytes(20_000))
    bundle = make_bundle(tmp_path / "2", 2)
    with files_of_at_most(10_000), pytest.raises(OSError, match=r"incoming/onnx/large\.onnx"):
        put(slots, bundle)
    assert running(slots) == 1 and not slots.incoming.exists() and status(slots)["slots"]["b"] is None
    assert put(slots, bundle)["version"] == 2


def test_the_slots_commands_know_that_they_run_in_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--root` is no variable of theirs, and there engines need no record."""
    monkeypatch.delenv("YOLO_COMPRESS_ROOT", raising=False)
    slot = tmp_path / "root" / "slots" / "a"
    slot.mkdir(parents=True)
    (slot / "build.py").write_text("import os\nopen('said', 'w').write(os.environ['YOLO_COMPRESS_ROOT'])\n")
    robot_switch.build(slot)
    assert (slot / "said").read_text() == str(tmp_path / "root")


def test_a_rollback_opens_no_door_to_older_bundles(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    for version in (1, 5):
        put(slots, make_bundle(tmp_path / str(version), version))
    assert rollback(slots, fake_health)["version"] == 1 == running(slots)
    for replayed in (3, 5):
        with pytest.raises(BundleRefused, match="expected one above 5"):
            put(slots, make_bundle(tmp_path / f"again{replayed}", replayed))
    assert running(slots) == 1
    put(slots, make_bundle(tmp_path / "6", 6))
    assert running(slots) == 6
    assert rollback(slots, fake_health)["version"] == 1


@pytest.mark.fault(70)
def test_a_rollback_of_a_rollback_is_refused_and_switch_undoes_it(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    with pytest.raises(EngineError, match="nothing is installed"):
        rollback(slots, fake_health)
    put(slots, make_bundle(tmp_path / "1", 1))
    with pytest.raises(EngineError, match="holds no tested bundle"):
        rollback(slots, fake_health)
    put(slots, make_bundle(tmp_path / "2", 2))
    with pytest.raises(EngineError, match="nothing newer"):
        switch(slots, fake_health)
    rollback(slots, fake_health)
    with pytest.raises(EngineError, match="nothing older"):
        rollback(slots, fake_health)
    assert switch(slots, fake_health)["version"] == 2 == running(slots)


def test_a_bundle_whose_engines_fail_leaves_what_runs(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    put(slots, make_bundle(tmp_path / "1", 1))
    bundle = make_bundle(tmp_path / "2", 2)

    def fails(slot: Path) -> None:
        raise Unhealthy("no", 7)

    for step in ("build", "health"):
        with pytest.raises(Unhealthy):
            put(slots, bundle, **{step: fails})
        assert running(slots) == 1 and status(slots)["slots"]["b"] is None
    assert put(slots, bundle)["version"] == 2


def test_rollback_to_a_slot_that_went_bad_is_refused(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    for version in (1, 2):
        put(slots, make_bundle(tmp_path / str(version), version))
    (slots.path("a") / "engines" / "x" / "engine.bin").write_bytes(b"rot")
    with pytest.raises(Unhealthy):
        rollback(slots, fake_health)
    (slots.path("a") / "onnx" / "fp32.onnx").write_bytes(b"net 9")
    with pytest.raises(BundleRefused, match="altered"):
        rollback(slots, lambda slot: pytest.fail("an engine was touched"))
    assert running(slots) == 2


def test_what_is_not_vouched_for_is_refused_before_anything_of_it_runs(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    put(slots, make_bundle(tmp_path / "1", 1))
    bad = {
        "unsigned": make_bundle(tmp_path / "unsigned", 2, None),
        "stranger": make_bundle(tmp_path / "stranger", 2, b"\x08" * 32),
        "altered": make_bundle(tmp_path / "altered", 2),
        "extra": make_bundle(tmp_path / "extra", 2),
        "failed gate": make_bundle(tmp_path / "gate", 2, gate={"passed": False, "forced": True}),
    }
    (bad["altered"] / "build.py").write_text("fail\n")
    (bad["extra"] / "sitecustomize.py").write_text("fail\n")
    for bundle in bad.values():
        with pytest.raises(BundleRefused):
            put(slots, bundle, build=lambda slot: pytest.fail("it was run"))
        assert status(slots)["slots"]["b"] is None and running(slots) == 1
    assert put(slots, bad["failed gate"], force=True)["version"] == 2


def test_one_at_a_time(tmp_path: Path) -> None:
    slots, bundle = Slots(tmp_path / "root"), make_bundle(tmp_path / "1", 1)
    with slots.locked(), pytest.raises(SlotsBusy):
        put(slots, bundle)
    assert put(slots, bundle)["version"] == 1


def test_a_damaged_state_is_not_read_as_none(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    for version in (1, 2):
        put(slots, make_bundle(tmp_path / str(version), version))
    rollback(slots, fake_health)
    for text in ("{", '{"schema": 1}', '{"schema": 1, "newest": true}', "[]", "[" * 100_000):
        (slots.root / "state.json").write_text(text)
        with pytest.raises(EngineError, match="state.json"):
            put(slots, make_bundle(tmp_path / f"3{len(text)}", 3))


def test_a_current_made_by_somebody_else_is_named(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "root")
    slots.root.mkdir()
    os.symlink("/etc", slots.root / "current")
    with pytest.raises(EngineError, match="slots/a or slots/b"):
        put(slots, make_bundle(tmp_path / "1", 1))


# The command line


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = ["--root", str(tmp_path / "root")]
    bundles = [make_bundle(tmp_path / "1", 1), make_bundle(tmp_path / "2", 2)]
    calls: list[list[str]] = []
    monkeypatch.setattr(robot_switch, "_run", lambda slot, command, seconds: calls.append(command))

    def last(words: list[str], code: int = 0) -> Any:
        assert robot_switch.main(words) == code
        out = capsys.readouterr()
        return json.loads(out.out.splitlines()[-1]) if code == 0 else out.err

    assert last(["status", *root])["version"] is None
    assert last(["install", str(bundles[0]), *root])["version"] == 1
    assert [command[0] for command in calls] == ["build.py", "bench.py"]
    assert last([*root, "install", str(bundles[1])])["version"] == 2
    assert last(["rollback", *root])["version"] == 1
    assert "nothing older" in last(["rollback", *root], 5)
    assert last(["switch", *root])["current"] == "b"
    assert "expected one above 2" in last(["install", str(make_bundle(tmp_path / "old", 1, x=1)), *root], 5)
    assert "No such file" in last(["install", str(tmp_path / "nowhere"), *root], 6)
    with Slots(tmp_path / "root").locked():
        assert "another switch.py" in last(["rollback", *root], 75)


def test_a_root_of_the_folder_one_stands_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert robot_switch.main(["--root", "slots", "status"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["root"] == str(tmp_path / "slots")


def test_a_bundles_own_commands_are_run_and_their_exit_code_kept(tmp_path: Path) -> None:
    bundle = tmp_path / "1"
    bundle.mkdir()
    (bundle / "build.py").write_text("import os\nos.mkdir('engines')\nopen('engines/e', 'w').write('e')\n")
    (bundle / "bench.py").write_text(
        "import sys\nassert sys.argv[1:] == ['--golden']\nprint('worst box 3 px')\nsys.exit(1)\n"
    )
    signed_manifest.seal(bundle, {"name": "demo"}, 1, SEED)
    slots = Slots(tmp_path / "root")
    with pytest.raises(Unhealthy, match="worst box 3 px") as failure:
        install(slots, bundle)
    assert failure.value.exit_code == 1 and status(slots)["current"] is None
    assert (slots.path("a") / "engines" / "e").exists()


def test_a_build_that_outlives_its_caller_keeps_the_lock(tmp_path: Path) -> None:
    bundle = tmp_path / "1"
    bundle.mkdir()
    (bundle / "build.py").write_text("import time\nopen('engines', 'w')\ntime.sleep(1)\n")
    signed_manifest.seal(bundle, {"name": "demo"}, 1, SEED)
    slots, better = Slots(tmp_path / "root"), make_bundle(tmp_path / "2", 2)
    words = ["-c", "import sys; from yolo_compress.runtime.commands.switch import main; main(sys.argv[1:])"]
    caller = subprocess.Popen([sys.executable, *words, "install", str(bundle), "--root", str(slots.root)])
    while not (slots.path("a") / "engines").exists():
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    with pytest.raises(SlotsBusy):
        put(slots, better)
    for _ in range(100):
        try:
            assert put(slots, better)["version"] == 2
            break
        except SlotsBusy:
            time.sleep(0.1)
    assert running(slots) == 2


@pytest.mark.fault(72)
@pytest.mark.slow
def test_a_real_bundle_killed_while_it_comes_in(tmp_path: Path) -> None:
    """Launchers, builds and golden frames as on a robot; the whole process group killed at various moments."""
    from tests.support.bundled import make_bundle as real_bundle  # torch, for this test alone

    one = real_bundle(tmp_path / "one")
    about = {key: value for key, value in json.loads((one / "manifest.json").read_text()).items() if key != "files"}
    two = shutil.copytree(one, tmp_path / "two")
    (two / "labels.txt").write_text("bolt\nnut\nwood screw\n")
    for version, bundle in ((1, one), (2, two)):
        signed_manifest.seal(bundle, about, version, SEED)
    with tarfile.open(tmp_path / "two.tar", "w") as archive:
        archive.add(two, "two")
    root = tmp_path / "root"
    current = root / "current"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def command(file: Path, *words: str, kill_after_s: float | None = None) -> int | None:
        child = subprocess.Popen(
            [sys.executable, str(file), *words],
            env={**environment, "YOLO_COMPRESS_ROOT": str(root)},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return child.wait(kill_after_s or 120)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return None

    assert command(one / "switch.py", "install", str(one)) == 0
    killed = 0
    for tenth in range(2, 30, 4):
        killed += command(current / "switch.py", "install", str(tmp_path / "two.tar"), kill_after_s=tenth / 10) is None
        assert command(current / "bench.py", "--golden") == 0
        assert signed_manifest.verify(current, signed_manifest.pinned_key())["version"] in (1, 2)
    assert killed >= 2
    assert command(current / "switch.py", "install", str(tmp_path / "two.tar")) == 0
    assert signed_manifest.verify(current, signed_manifest.pinned_key())["version"] == 2
    assert command(current / "detect.py", str(current / "golden" / "0.npy"), "--quiet") == 0
    assert command(current / "switch.py", "rollback") == 0
    assert signed_manifest.verify(current, signed_manifest.pinned_key())["version"] == 1
    assert command(current / "switch.py", "install", str(tmp_path / "two.tar")) == 5, "replayed"
    assert not list(root.rglob("__pycache__"))


# Killed at every step

STEPS = ("replace", "rename", "symlink", "unlink", "rmdir", "mkdir", "fsync", "open", "write")


def dies_at(number: int, work: Callable[[], object]) -> int:
    """Runs `work` in a child that ends, as by SIGKILL, before or after a call to the file system: the number-th of both.

    Returns:
        KILLED, or 0 where the work was done before.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            passed = 0

            def dying(function: Callable[..., Any]) -> Callable[..., Any]:
                def called(*args: Any, **kwargs: Any) -> Any:
                    nonlocal passed
                    for after in (False, True):
                        if after:
                            answer = function(*args, **kwargs)
                        passed += 1
                        if passed == number:
                            os._exit(KILLED)
                    return answer

                return called

            for name in STEPS:
                setattr(os, name, dying(getattr(os, name)))
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until_it_survives(work: Callable[[], object], restore: Callable[[], None], check: Callable[[], None]) -> int:
    for number in range(1, 5000):
        restore()
        code = dies_at(number, work)
        if code == 0:
            return number - 1
        assert code == KILLED
        check()
    raise AssertionError("no end")


@pytest.mark.fault(72)
@pytest.mark.slow
def test_a_kill_at_any_step_of_an_installation_leaves_a_working_engine(tmp_path: Path) -> None:
    """Where nothing ran before, where the other slot is empty, and where it holds an older bundle."""
    bundles = [make_bundle(tmp_path / str(version), version) for version in range(3)]
    for installed in (0, 1, 2):
        slots, kept = Slots(tmp_path / f"root{installed}"), tmp_path / f"kept{installed}"
        for version in range(installed):
            put(slots, bundles[version])
        slots.root.mkdir(exist_ok=True)
        shutil.copytree(slots.root, kept, symlinks=True)

        def restore(root: Path = slots.root, kept: Path = kept) -> None:
            shutil.rmtree(root)
            shutil.copytree(kept, root, symlinks=True)

        def check(slots: Slots = slots, installed: int = installed) -> None:
            if installed or slots.current():
                assert running(slots) in (installed - 1, installed)
            assert put(slots, bundles[installed])["version"] == installed == running(slots)
            if installed:
                assert rollback(slots, fake_health)["version"] == installed - 1 == running(slots)

        points = until_it_survives(lambda slots=slots, bundle=bundles[installed]: put(slots, bundle), restore, check)
        assert points > 60


@pytest.mark.fault(72)
@pytest.mark.slow
@pytest.mark.parametrize("verb", [rollback, switch])
def test_a_kill_at_any_step_of_a_switch_leaves_a_working_engine(tmp_path: Path, verb: Callable[..., Any]) -> None:
    slots, kept = Slots(tmp_path / "root"), tmp_path / "kept"
    for version in (1, 2):
        put(slots, make_bundle(tmp_path / str(version), version))
    if verb is switch:
        rollback(slots, fake_health)
    shutil.copytree(slots.root, kept, symlinks=True)
    goal = 1 if verb is rollback else 2

    def restore() -> None:
        shutil.rmtree(slots.root)
        shutil.copytree(kept, slots.root, symlinks=True)

    def check() -> None:
        assert running(slots) in (1, 2)
        assert slots.newest() == 2
        if running(slots) != goal:
            verb(slots, fake_health)
        assert running(slots) == goal
        with pytest.raises(BundleRefused):
            put(slots, tmp_path / "2" if goal == 1 else make_bundle(tmp_path / os.urandom(4).hex(), 1, x=1))

    assert until_it_survives(lambda: verb(slots, fake_health), restore, check) > 20


@pytest.mark.fault(72)
def test_all_is_on_the_disk_before_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut forgets what was not synced: file, folder and mark of the slot are, when `current` is replaced."""
    slots = Slots(tmp_path / "root")
    put(slots, make_bundle(tmp_path / "1", 1))
    synced: set[int] = set()
    seen: list[set[int]] = []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replaced(source: str, target: str) -> None:
        if target.endswith("current"):
            seen.append(set(synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", replaced)
    put(slots, make_bundle(tmp_path / "2", 2))
    tree = [slots.path("b"), *slots.path("b").rglob("*"), slots.path("b.json"), slots.root / "slots"]
    assert len(tree) > 8 and {path.stat().st_ino for path in tree} <= seen[0]
    assert slots.root.stat().st_ino in synced


# Tars


def tar_of(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], name: str = "x.tar", mode: str = "w") -> Path:
    path = tmp_path / name
    with tarfile.open(path, mode) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return path


def member(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
    return info, data


@pytest.mark.parametrize(("name", "mode"), [("b.tar", "w"), ("b.tar.gz", "w:gz")])
@pytest.mark.parametrize("arcname", [".", "", "demo-1"])
def test_a_tar_is_taken_with_and_without_a_folder(tmp_path: Path, name: str, mode: str, arcname: str) -> None:
    bundle = make_bundle(tmp_path / "1", 1)
    with tarfile.open(tmp_path / name, mode) as archive:
        if arcname:
            archive.add(bundle, arcname)
        else:
            for entry in sorted(bundle.iterdir()):
                archive.add(entry, entry.name)
    slots = Slots(tmp_path / "root")
    assert put(slots, tmp_path / name)["version"] == 1 == running(slots)


EVIL = {
    "absolute": [member("/tmp/evil")],
    "parent": [member("../evil")],
    "parent inside": [member("onnx/../../evil")],
    "dot": [member("a/./b")],
    "empty part": [member("a//b")],
    "backslash": [member("..\\evil")],
    "newline": [member("a\nb")],
    "symlink": [member("link", kind=tarfile.SYMTYPE, link="/etc")],
    "through a symlink": [member("link", kind=tarfile.SYMTYPE, link=".."), member("link/evil")],
    "hard link": [member("link", kind=tarfile.LNKTYPE, link="../evil")],
    "device": [member("null", kind=tarfile.CHRTYPE)],
    "block device": [member("sda", kind=tarfile.BLKTYPE)],
    "pipe": [member("pipe", kind=tarfile.FIFOTYPE)],
    "twice": [member("manifest.json"), member("manifest.json", b"y")],
    "file and folder": [member("a"), member("a/b")],
    "folder and file": [member("a/b"), member("a")],
    "deep": [member("/".join("d" * 40) + "/f")],
    "no manifest": [member("readme")],
    "large": [member("large", b"x" * 5000)],
    "many": [member(f"f{i}") for i in range(12)],
    "empty": [],
    "an engine of the carrier's": [member("manifest.json"), member("engines/onnxruntime-fp32/engine.json")],
    "the same, in a folder": [member("b/manifest.json"), member("b/engines/onnxruntime-fp32/engine.json")],
    "a device of the carrier's": [member("manifest.json"), member("device.json")],
}


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", EVIL)
def test_an_evil_tar_is_refused_and_nothing_stands_outside(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(BundleRefused):
        unpack(tar_of(tmp_path, EVIL[name]), inner / "into", max_bytes=4000, max_files=10)
    assert sorted(os.listdir(tmp_path)) == ["bundle.pub", "inner", "x.tar"] and os.listdir(inner) == ["into"]
    assert not any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in inner.rglob("*"))
    assert not Path("/tmp/evil").exists()


@pytest.mark.fault(21)
def test_a_gzip_bomb_and_a_claim_of_a_huge_header_are_refused(tmp_path: Path) -> None:
    bomb = tar_of(tmp_path, [member("zeros", bytes(200 << 20))], "bomb.tar.gz", "w:gz")
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(BundleRefused):
        unpack(bomb, tmp_path / "into", max_bytes=1 << 20)
    header, _ = member("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 33
    (tmp_path / "huge.tar").write_bytes(header.tobuf() + bytes(4096))
    with pytest.raises(BundleRefused, match="header"):
        unpack(tmp_path / "huge.tar", tmp_path / "into2")


@pytest.mark.fault(21)
def test_headers_that_only_announce_headers_are_refused(tmp_path: Path) -> None:
    """`tarfile` follows them by recursion."""
    header, _ = member("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    (tmp_path / "deep.tar").write_bytes((header.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 3000)
    with pytest.raises(BundleRefused):
        unpack(tmp_path / "deep.tar", tmp_path / "into")


@given(
    zipped=st.booleans(),
    cut=st.one_of(st.none(), st.floats(0, 0.999)),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=3),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_tar_is_refused_or_found_by_the_manifest(
    tmp_path: Path, zipped: bool, cut: float | None, flips: list[tuple[float, int]]
) -> None:
    place = tmp_path / os.urandom(6).hex()
    with tarfile.open(make_bundle(place / "1", 1).parent / "b.tar", "w:gz" if zipped else "w") as archive:
        archive.add(place / "1", ".")
    content = bytearray((place / "b.tar").read_bytes())
    for at, bits in flips:
        content[int(at * len(content))] ^= bits
    (place / "b.tar").write_bytes(content if cut is None else content[: int(cut * len(content))])
    try:
        assert (
            signed_manifest.verify(unpack(place / "b.tar", place / "into"), signed_manifest.pinned_key())["version"]
            == 1
        )
    except BundleRefused:
        assert cut is not None or flips
    assert {"1", "b.tar"} <= set(os.listdir(place)) <= {"1", "b.tar", "into"}
    shutil.rmtree(place)


# The state machine


class Robot(RuleBasedStateMachine):
    """Any order of calls, kills in the middle included; what is refused changes nothing."""

    place: Path

    @initialize()
    def start(self) -> None:
        self.folder = self.place / os.urandom(6).hex()
        self.slots = Slots(self.folder / "root")
        self.current: int | None = None
        self.other: int | None = None  # None where it may hold anything
        self.newest = -1

    def bundle(self, version: int, seed: bytes | None = SEED) -> Path:
        return make_bundle(self.folder / os.urandom(6).hex(), version, seed)

    @rule(version=st.integers(0, 6), step=st.sampled_from(["", "build", "health", "unsigned"]))
    def installs(self, version: int, step: str) -> None:
        def fails(slot: Path) -> None:
            raise Unhealthy("no", 1)

        bundle = self.bundle(version, None if step == "unsigned" else SEED)
        try:
            put(self.slots, bundle, **({step: fails} if step in ("build", "health") else {}))
        except BundleRefused:
            assert step == "unsigned" or version <= self.newest
        except Unhealthy:
            assert step in ("build", "health") and version > self.newest
            self.other = None
        else:
            same = version == self.current and step != "unsigned"
            assert same or (not step and version > self.newest)
            if not same:
                self.other, self.current, self.newest = self.current, version, version

    @rule(ahead=st.integers(1, 3), number=st.integers(1, 150))
    def is_killed_while_installing(self, ahead: int, number: int) -> None:
        version, bundle = self.newest + ahead, self.bundle(self.newest + ahead)
        code = dies_at(number, lambda: put(self.slots, bundle))
        assert code in (0, KILLED)
        now = None if self.slots.current() is None else running(self.slots)
        assert now == version or (code == KILLED and now == self.current)
        if now == version:
            self.other, self.current, self.newest = self.current, version, version
        else:
            mark = self.slots.mark(self.slots.idle())
            self.other = None if mark is None else mark["version"]

    @rule(number=st.integers(1, 60), back=st.booleans())
    @precondition(lambda self: self.current is not None)
    def is_killed_while_switching(self, number: int, back: bool) -> None:
        mark = self.slots.mark(self.slots.idle())
        if mark is None or (mark["version"] < self.current) != back:
            return
        dies_at(number, lambda: (rollback if back else switch)(self.slots, fake_health))
        now = running(self.slots)
        assert now in (self.current, mark["version"])
        if now != self.current:
            self.other, self.current = self.current, now
            self.newest = max(self.newest, now)

    @rule(back=st.booleans())
    def goes_to_the_other(self, back: bool) -> None:
        try:
            (rollback if back else switch)(self.slots, fake_health)
        except EngineError:
            known = self.current is not None and self.other is not None
            assert not known or (self.other < self.current) != back  # type: ignore[operator]
        else:
            assert self.current is not None
            now = running(self.slots)
            assert (now < self.current) == back and self.other in (None, now)
            self.other, self.current = self.current, now
            self.newest = max(self.newest, now)

    @invariant()
    def a_working_engine_runs(self) -> None:
        if self.current is None:
            assert self.slots.current() is None
        else:
            assert running(self.slots) == self.current == status(self.slots)["version"]
            assert self.slots.newest() == self.newest


@pytest.mark.fault(70)
@pytest.mark.slow
def test_any_order_of_calls(tmp_path: Path) -> None:
    Robot.place = tmp_path
    run_state_machine_as_test(
        Robot, settings=settings(max_examples=60, stateful_step_count=12, deadline=None, derandomize=True)
    )


@pytest.fixture(autouse=True)
def nothing_left_in_tmp() -> Iterator[None]:
    assert not Path("/tmp/evil").exists()
    yield
