"""Locks: one run at a time, no stale locks, and a waiting run shows which process holds the lock."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from yolo_compress.errors import Locked, StorageError
from yolo_compress.files import lock as locks
from yolo_compress.files.lock import holder, lock

HOLDER = """
import os, signal, sys, time
from pathlib import Path
from yolo_compress.files.lock import lock
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit SIG_IGN
with lock(Path(sys.argv[1]), "prune of recipe bccd"):
    child = os.fork() if "fork" in sys.argv else 1
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def held(path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that holds the lock. Yield it, and the process id of its child if it forks."""
    process = start(path, *arguments)
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        stop(process)


def wait_for_line(stream, pattern: str) -> str:
    line = stream.readline()
    assert re.fullmatch(pattern, line), line
    return line


@pytest.mark.fault(54)
def test_without_wait_it_raises_and_names_the_process(tmp_path: Path) -> None:
    path = tmp_path / "weights" / ".lock"
    with held(path) as (process, _):
        with pytest.raises(Locked) as caught, lock(path, "qat of recipe bccd", wait=False):
            pytest.fail("the lock was given twice")
        host = re.escape(socket.gethostname())
        who = rf"pid {process.pid} on host {host} \(prune of recipe bccd, since \d\d:\d\d:\d\d\)"
        assert re.search(who, str(caught.value)), caught.value
        assert caught.value.exit_code == 75


@pytest.mark.fault(55)
def test_waits_with_one_line_and_a_killed_holder_leaves_nothing(tmp_path: Path, capsys) -> None:
    path = tmp_path / ".lock"
    with held(path) as (process, _):
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {process.pid}"])
        with lock(path, "qat of recipe bccd"):
            assert process.wait(20) == -signal.SIGKILL
            assert f"pid {os.getpid()} " in holder(path) and "qat of recipe bccd" in holder(path)
        killer.wait()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(rf"waiting for pid {process.pid} on host .+ \(prune of recipe bccd, since [\d:]+\)", lines[0])


@pytest.mark.fault(55)
def test_a_forked_worker_does_not_hold_the_lock_after_its_parent_ended(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with held(path, "fork") as (process, child):
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        try:
            os.kill(child, 0)  # still there
            # The child closes the lock in its first instruction. This waits for that, not for the child's end.
            with lock(path, "next"):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_ctrl_c_ends_the_wait(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with held(path):
        waiting = start(path)
        try:
            wait_for_line(waiting.stderr, r"waiting for pid .*\n")
            waiting.send_signal(signal.SIGINT)
            _, errors = waiting.communicate(timeout=20)  # the holder sleeps for 60 s
            assert "KeyboardInterrupt" in errors
        finally:
            stop(waiting)


def test_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with pytest.raises(KeyError), lock(path, "first"):
        raise KeyError
    with lock(path, "second", wait=False):
        pass


def test_a_process_does_not_wait_for_itself(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path, "outer"):
        with pytest.raises(RuntimeError, match="already"), lock(path, "inner"):
            pass
        other = subprocess.run([sys.executable, "-c", OTHER, str(path)], capture_output=True, text=True)
        assert "errors.Locked: " in other.stderr  # the failed attempt has not released the lock


OTHER = """
import sys
from pathlib import Path
from yolo_compress.files.lock import lock
with lock(Path(sys.argv[1]), "other", wait=False):
    pass
"""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\x00", "[" * 100_000, '{"pid": ' + "9" * 5000 + "}"])
def test_an_unreadable_holder_is_still_waited_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".lock"
    path.write_text(text)
    assert holder(path) == f"another run (which holds {path})"


def test_a_file_system_without_locks_is_a_storage_error(monkeypatch, tmp_path: Path) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"cannot lock .*\.lock: No locks available"), lock(tmp_path / ".lock", "x"):
        pass


def test_a_store_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(StorageError, match="cannot lock"), lock(tmp_path / "weights" / ".lock", "x"):
        pass


def notices(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Take a lock twice on a file system that no lock was taken on before."""
    monkeypatch.setattr(locks, "_judged", set())
    for _ in range(2):
        with lock(folder / ".lock", "prune"):
            pass
    return capsys.readouterr().err


def test_a_file_system_that_gives_a_lock_twice_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert notices(tmp_path, capsys, monkeypatch) == ""
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda descriptor, operation: None)
        expected = f"{tmp_path}: locks do not work on this file system; run one command at a time here\n"
        assert notices(tmp_path, capsys, patch) == expected


@pytest.mark.parametrize(
    "options", ["rw,vers=3,nolock,proto=tcp", "rw,vers=4.2,local_lock=flock", "rw,local_lock=none"]
)
def test_a_file_system_with_locks_of_one_machine_is_reported_once(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"30 1 {os.major(device)}:{os.minor(device)} / /share rw,relatime shared:1 - nfs server:/share {options}\n"
        "31 1 250:250 / /other rw - nfs server:/other rw,nolock\n"
    )
    monkeypatch.setattr(locks, "MOUNTS", mounts)
    found = notices(tmp_path, capsys, monkeypatch)
    if "none" in options:
        assert found == ""
    else:
        (option,) = locks.LOCAL & set(options.split(","))
        assert found == (
            f"{tmp_path}: locks of this file system work on one machine only ({option}); run commands of one machine at a time here\n"
        )
