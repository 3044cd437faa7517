"""Atomic writes: the file is the whole old or the whole new one, whichever system call fails or is the last."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from yolo_compress.errors import StorageError
from yolo_compress.files import atomic

OLD, NEW = b"old" * 1000, b"new" * 5000


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(OLD)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_call(monkeypatch: pytest.MonkeyPatch, name: str, n: int, code: int) -> list[int]:
    """Make the n-th call of os.<name> fail. Return a list that grows with each call."""
    real = getattr(os, name)
    calls: list[int] = []

    def call(*args, **kwargs):
        calls.append(len(calls) + 1)
        if len(calls) == n:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)
    return calls


def test_writes_bytes_and_text_with_the_umask_s_mode(target: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic.atomic_write(target, NEW)
        atomic.atomic_write(target.with_name("é.txt"), "ä\n")
    finally:
        os.umask(before)
    assert target.read_bytes() == NEW
    assert target.with_name("é.txt").read_text(encoding="utf-8") == "ä\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert names(target.parent) == ["model.pt", "é.txt"]


@pytest.mark.fault(47, 49)
@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EXDEV, errno.ESTALE],
)
@pytest.mark.parametrize(
    ("call", "n", "left"), [("write", 1, OLD), ("fsync", 1, OLD), ("replace", 1, OLD), ("fsync", 2, NEW)]
)
def test_a_failing_call_leaves_a_whole_file(
    monkeypatch, target: Path, call: str, n: int, left: bytes, code: int
) -> None:
    with monkeypatch.context() as patch:
        calls = fail_call(patch, call, n, code)
        with pytest.raises(StorageError) as caught:
            atomic.atomic_write(target, NEW)
    assert len(calls) == n
    assert target.read_bytes() == left
    assert names(target.parent) == ["model.pt"]
    assert str(target) in str(caught.value) and os.strerror(code) in str(caught.value)
    assert ("MiB free" in str(caught.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    atomic.atomic_write(target, NEW)
    assert target.read_bytes() == NEW


@pytest.mark.fault(49)
def test_short_writes_are_continued(monkeypatch, target: Path) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    atomic.atomic_write(target, NEW)
    assert target.read_bytes() == NEW


@pytest.mark.fault(49)
def test_a_folder_that_cannot_be_fsynced_is_not_an_error(monkeypatch, target: Path) -> None:
    fail_call(monkeypatch, "fsync", 2, errno.EINVAL)
    atomic.atomic_write(target, NEW)
    assert target.read_bytes() == NEW


@pytest.mark.fault(56)
def test_a_folder_removed_meanwhile_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone/model\.pt: No such file or directory"):
        atomic.atomic_write(tmp_path / "gone" / "model.pt", NEW)


def test_the_longest_name_works(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127 + "x")  # 255 bytes
    atomic.atomic_write(path, NEW)
    assert path.read_bytes() == NEW


def test_atomic_path_keeps_the_extension_and_the_old_file_until_the_end(target: Path) -> None:
    with atomic.atomic_path(target) as temporary:
        assert temporary.suffix == ".pt" and temporary.parent == target.parent
        assert atomic.is_temporary(temporary.name) and not atomic.is_temporary(target.name)
        temporary.write_bytes(NEW)
        assert target.read_bytes() == OLD
    assert target.read_bytes() == NEW
    assert names(target.parent) == ["model.pt"]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(KeyError("bug"), KeyError), (OSError(errno.ENOSPC, "full"), StorageError), (OSError("x"), OSError)],
)
def test_atomic_path_drops_the_new_file_when_the_block_raises(target: Path, raised: Exception, seen: type) -> None:
    with pytest.raises(seen), atomic.atomic_path(target) as temporary:
        temporary.write_bytes(NEW[:10])
        raise raised
    assert target.read_bytes() == OLD
    assert names(target.parent) == ["model.pt"]


def test_a_library_that_wrote_nothing_is_a_storage_error(target: Path) -> None:
    with pytest.raises(StorageError, match=r"model\.pt"), atomic.atomic_path(target):
        pass
    assert target.read_bytes() == OLD


def test_symlink_is_replaced_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "prune"
    for goal in ("one", "two"):
        atomic.atomic_symlink(link, goal)
        assert os.readlink(link) == goal
    assert names(tmp_path) == ["prune"]


def test_require_free_works_for_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    atomic.require_free(tmp_path / "a" / "b", 0, "prune")
    with pytest.raises(StorageError, match="prune needs"):
        atomic.require_free(tmp_path / "a" / "b", 1e12, "prune")


WRITER = """
import resource, sys
from pathlib import Path
from yolo_compress.files.atomic import atomic_write
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
atomic_write(Path(sys.argv[1]), b"new" * 5000)
"""


def run_writer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRITER, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.fault(46)
def test_a_kill_at_any_step_leaves_a_whole_file(target: Path) -> None:
    contents = []
    for n in range(1, 20):
        target.write_bytes(OLD)
        done = run_writer(str(target), YOLO_COMPRESS_CRASH_AT=str(n))
        contents.append(target.read_bytes())
        if done.returncode == 0:
            break
        assert done.returncode == atomic.CRASH_STATUS, done.stderr
    assert n == 9  # before and after write, fsync, replace and folder fsync; the ninth run ends normally
    assert contents == [OLD] * 5 + [NEW] * 4


@pytest.mark.fault(47)
def test_a_real_limit_of_the_system_is_a_storage_error(target: Path) -> None:
    done = run_writer(str(target), "4096")
    assert done.stderr.strip().splitlines()[-1].startswith(f"yolo_compress.errors.StorageError: cannot write {target}")
    assert target.read_bytes() == OLD
    assert names(target.parent) == ["model.pt"]
