"""The chain under faults of the machine: signals, crashes, wrong clocks, removed folders, full disks, too little memory."""

from __future__ import annotations

import errno
import faulthandler
import itertools
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import fake_chain
from tests.support.fake_chain import Chain, Killed, sound
from yolo_compress.chain import STAGES, Stage
from yolo_compress.cli.main import main
from yolo_compress.errors import EnvironmentLacks, StorageError
from yolo_compress.status import status
from yolo_compress.store import environment, resources


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with fake_chain.fake_chain(tmp_path) as made:
        yield made


@pytest.fixture
def on_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, which `main` replaces. Do not ignore SIGINT, as a process in the background does."""
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


def says(chain: Chain, stage: str) -> tuple[str, str]:
    """Return the state of a stage and the reasons."""
    row = next(row for row in status(chain.recipe(), chain.store) if row.stage == stage)
    return row.state, "\n".join(row.why)


# Signals and crashes


@pytest.mark.fault(44, 45)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("stage", "before"), [("prune", "baseline"), ("export", "prune"), ("report", "bench")])
def test_a_signal_in_any_write_of_a_stage(
    chain: Chain,
    on_sigterm: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    before: str,
    number: signal.Signals,
    code: int,
) -> None:
    """Send a real signal during each write in turn: exit code and hint are right, no file is incomplete, the next run succeeds."""
    chain.run(before)
    there, write = sound(chain.store), os.write
    for point in range(1, 100):
        writes = itertools.count(1)

        def interrupted(descriptor: int, content: memoryview, point: int = point, writes: Any = writes) -> int:
            if next(writes) != point:
                return write(descriptor, content)
            count = write(descriptor, content[: len(content) // 2])
            signal.raise_signal(number)
            return count

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            ended = main([stage, "recipe=r.yaml"])
        if ended == 0:
            break
        assert ended == code
        assert capsys.readouterr().err.endswith("; the same command continues where it stopped\n")
        assert not [path for path in chain.folder.rglob("*") if path.name.startswith(".tmp")]
        assert sound(chain.store) == there
        for partial in chain.store.folder.glob(f"{stage}-*.partial"):
            shutil.rmtree(partial)  # so that the next run makes every write
    assert point >= 5, "writes of the inputs, of the stage and of its manifest"
    assert says(chain, stage)[0] == "up to date"


@pytest.mark.fault(53)
@pytest.mark.parametrize("stage", ["prune", "engine", "bench"])
def test_a_stage_that_crashes_the_process_loses_nothing(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Crash as a C library does: the shell reports the signal, earlier stages stay, and the same command continues."""
    chain.run("baseline")
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work = Chain._work

        def crash(chain: Chain, name: str, job: Any) -> dict[str, Any]:
            if name == stage:
                (job.out / "model.pt").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGSEGV)
            return work(chain, name, job)

        Chain._work = crash  # type: ignore[method-assign]
        try:
            main(["run", "recipe=r.yaml"])
        finally:
            os._exit(99)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
    there = sound(chain.store)
    assert "baseline" in {one.stage for one in there.values()} and says(chain, stage)[0] == "interrupted"
    chain.run("report")
    assert set(chain.states().values()) == {"up to date", "left out"}
    assert there.items() <= sound(chain.store).items()


# Folders


def removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)


def replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opens(path, flags, mode, **options)

    opens = os.open
    monkeypatch.setattr(os, "open", refuses)  # rights do not stop root


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("happens", "words"),
    [(removed, "No such file"), (replaced, "Not a directory"), (read_only, "Read-only file system")],
)
@pytest.mark.parametrize("folder", ["partial", "weights"])
def test_a_folder_that_is_taken_away_during_a_stage(
    chain: Chain,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    happens: Callable[[Path, pytest.MonkeyPatch], None],
    words: str,
    folder: str,
) -> None:
    chain.run("baseline")
    write = fake_chain.atomic_write
    with monkeypatch.context() as patch:

        def meanwhile(path: Path, content: bytes | str) -> None:
            if path.name == "model.pt":
                happens(path.parent if folder == "partial" else chain.folder / "weights", patch)
            write(path, content)

        patch.setattr(fake_chain, "atomic_write", meanwhile)
        assert main(["prune", "recipe=r.yaml"]) == StorageError.exit_code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cannot ") and words in error
    if (weights := chain.folder / "weights").is_file():
        weights.unlink()
    for file in chain.store.folder.glob("*.partial"):
        file.is_file() and file.unlink()
    chain.run("report")
    assert set(chain.states().values()) == {"up to date", "left out"}


# Clocks and versions


@pytest.mark.fault(57)
@pytest.mark.parametrize("year", [1970, 2033])
def test_times_of_files_and_of_the_clock_decide_nothing(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, year: int
) -> None:
    """All mtimes are equal, or older or newer than all others, and the clock jumps back by an hour at each call."""
    chain.run("report")
    seconds = (year - 1970) * 365.25 * 86400
    for path in [*chain.folder.rglob("*")]:
        os.utime(path, (seconds, seconds), follow_symlinks=False)
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert set(chain.states().values()) == {"up to date", "left out"}
    chain.run("report")
    assert chain.ran == []
    chain.run("prune", again=True)
    chain.run("report")
    assert [stage for stage, _ in chain.ran or ()] == ["export", "engine", "bench", "report"]


@pytest.mark.fault(58)
def test_another_version_of_a_stage_makes_it_stale_and_another_library_is_named(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "describe", lambda: {"packages": {"torch": "2.14", "onnx": "1.23"}})
    chain.run("report")
    monkeypatch.setattr(environment, "describe", lambda: {"packages": {"torch": "2.15", "onnx": "1.23"}})
    assert says(chain, "prune") == ("up to date", "made with torch 2.14, now 2.15")
    row = STAGES["prune"]
    newer = Stage(**{**vars(row), "version": row.version + 1})
    monkeypatch.setitem(STAGES, "prune", newer)
    assert says(chain, "prune") == ("stale", f"version: {row.version} -> {newer.version}")
    assert says(chain, "baseline")[0] == "up to date" and says(chain, "report")[0] == "stale"
    chain.run("report")
    assert [stage for stage, _ in chain.ran or ()] == ["prune", "export", "engine", "bench", "report"]


# Disk, memory and many runs


@pytest.mark.fault(48)
def test_a_stage_needs_twice_the_estimated_disk_space(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage does not start: it needs twice 12 models of 260 MiB. A small model needs only the minimum."""
    free = SimpleNamespace(free=6239 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    chain.ran = []
    assert main(["baseline", "recipe=r.yaml", "baseline.model=yolov8x.yaml"]) == StorageError.exit_code
    assert "stage baseline needs 6240 MiB at weights and 6239 MiB are free: make room first" in capsys.readouterr().err
    assert chain.ran == []
    free.free = 512 << 20
    chain.run("report")
    free.free = 511 << 20
    with pytest.raises(StorageError, match="stage report needs 512 MiB at .* and 511 MiB are free"):
        chain.run("report", again=True)


@pytest.mark.fault(48)
def test_the_estimate_follows_the_model_that_a_stage_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model.pt": {"size": 100 << 20}, "results.csv": {"size": 5}}
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(files=files))
    assert resources.needed_mib(None, [artifact]) == 2 * 12 * 100
    monkeypatch.chdir(tmp_path)
    with open("half.pt", "wb") as file:
        file.truncate(50 << 20)
    assert resources.needed_mib(SimpleNamespace(model=None, checkpoint="half.pt"), []) == 2 * 12 * 2 * 50
    assert resources.needed_mib(SimpleNamespace(model="yolov8n.yaml", checkpoint=None), []) == resources.FREE_MIB


@pytest.mark.fault(51)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
    ],
)
@pytest.mark.parametrize("stage", ["prune", "export", "bench"])
def test_out_of_memory_is_an_error_and_the_chain_continues(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, error: Exception
) -> None:
    work = Chain._work

    def little(chain: Chain, name: str, job: Any) -> dict[str, Any]:
        if name == stage:
            raise error
        return work(chain, name, job)

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "_work", little)
        assert main(["run", "recipe=r.yaml"]) == EnvironmentLacks.exit_code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: stage {stage}: out of memory (") and "lower data.imgsz" in said
    chain.run("report")
    assert next(iter(chain.ran or ()))[0] == stage


@pytest.mark.fault(51)
def test_another_error_is_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), resources.memory_errors("prune"):
        raise RuntimeError("shapes do not match")


def files(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(str(path) for path in folder.rglob("*")))


@pytest.mark.fault(63)
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_thousand_interruptions_cost_no_disk(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of 1,000 epochs is killed after each epoch: every run continues, and the files do not grow."""
    monkeypatch.setattr(fake_chain, "EPOCHS", 1000)
    monkeypatch.setattr(fake_chain, "time", SimpleNamespace(sleep=lambda seconds: None))
    sizes = set()
    for epoch in range(1, 1001):
        chain.stop_after = epoch if epoch < 1000 else None
        with nullcontext() if epoch == 1000 else pytest.raises(Killed):
            chain.run("baseline")
        assert chain.ran == [("baseline", epoch - 1)]
        if epoch % 100 == 1:
            sizes.add(files(chain.folder))
    assert len(sizes) == 1
    published = files(chain.folder)
    for _ in range(10):
        chain.run("baseline", again=True)
    assert files(chain.folder) == published
    assert sum(path.stat().st_size for path in chain.folder.rglob("*") if path.is_file()) < 20_000
