"""One case after another through a door: its end is meant, in seconds and within memory, or it is a failure."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from yolo_compress.exits import BUG, explain

CASES = 20_000  # over all doors
SECONDS = 10
MEMORY = 2 << 30  # beside what the process has when the case starts
MEANT = {0, 1, 2, 3, 4, 5, 6, 7}

Call = Callable[[Any], int | None]  # its exit code, where it is a command; else it ends with an error or without one


@dataclass(frozen=True)
class Door:
    """A way into the product.

    Attributes:
        name: for the table.
        share: of CASES.
        make: gives the cases, what is called with each, and a sound case, which has to pass; the folder is its own.
    """

    name: str
    share: int
    make: Callable[[Path], tuple[SearchStrategy[Any], Call, Any]]


@dataclass
class Outcome:
    """Of a door. `failures` has a text for each kind of failure, by the place where it happened, and `failed` counts them all."""

    cases: int = 0
    failed: int = 0
    seconds: float = 0.0
    slowest_ms: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)  # cases by exit code


class Hung(BaseException):
    """The case used up its seconds of processor time."""


def run(door: Door, folder: Path, cases: int, start: int = 0) -> Outcome:
    """The same cases for the same number of them and the same start of the generator."""
    outcome = Outcome()
    strategy, call, sound = door.make(folder)
    if (end := _ended(call, sound)) != ("", 0):
        raise AssertionError(f"{door.name}: the sound case ends with {end}")

    @seed(start)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(value: Any) -> None:
        if outcome.cases == cases:
            return
        outcome.cases += 1
        began = time.perf_counter()
        found, code = _ended(call, value)
        seconds = time.perf_counter() - began
        outcome.seconds += seconds
        outcome.slowest_ms = max(outcome.slowest_ms, 1000 * seconds)
        outcome.ends[code] = outcome.ends.get(code, 0) + 1
        if not found and seconds > SECONDS:
            found = f"{seconds:.0f} s"
        if found:
            outcome.failed += 1
            outcome.failures.setdefault(found.splitlines()[0], f"{found}\ncase: {str(value)[:600]}")

    each()
    return outcome


def _ended(call: Call, value: Any) -> tuple[str, int]:
    """What is wrong with the end of a case, its first line the kind and the place; and the exit code."""
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            with _limits():
                code = call(value) or 0
        except Hung as error:
            return f"hung at {_place(error)}", BUG
        except MemoryError as error:
            return f"memory at {_place(error)}", BUG
        except Exception as error:
            code = explain(error, True)
            if code == BUG:
                text = "".join(traceback.format_exception(error)[-6:])
                return f"{type(error).__name__} at {_place(error)}\n{text}", code
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if "memory is used up" in said:
        return f"memory\n{said}", code
    if code == BUG or code not in MEANT:
        lines = [line.strip() for line in said.splitlines() if line.strip().startswith("File")]
        return f"exit code {code} at {lines[-1] if lines else '?'}\n{said[-1500:]}", code
    return "", code


def _place(error: BaseException) -> str:
    """The last frame of the product on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "yolo_compress/" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Processor time by SIGPROF, since pytest-timeout has the clock's alarm, and address space."""

    def hung(number: int, frame: FrameType | None) -> None:
        raise Hung

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = limit = resource.getrlimit(resource.RLIMIT_AS)
    before, terminated = signal.signal(signal.SIGPROF, hung), signal.getsignal(signal.SIGTERM)
    here = os.getcwd()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGPROF, before)
        signal.signal(signal.SIGTERM, terminated)
        os.chdir(here)
