"""Measure engines alternately: one process per engine, and rounds in ABBA order, so that drift affects all engines equally."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, Callable, List, Optional, Sequence, Union

from ..errors import LatencyError
from .messages import About, Measured, Round, RoundRequest, Spec

_PACKAGE = __name__.rpartition(".")[0]
MODULE = _PACKAGE + ".latency"
_ROOT = str(Path(__file__).resolve().parents[_PACKAGE.count(".") + 1])  # folder that the package is imported from
PATIENCE_S = 900.0  # limit for one answer: loading an engine, or one round of a slow model
STDERR_KEPT = 2000  # last characters of a failed child's stderr that are reported


class _Child:
    """A child process that measures one engine. The process is ended after the measurement and on any failure."""

    def __init__(self, spec: Spec) -> None:
        self.label = str(spec.get("label") or spec.get("engine") or spec.get("module"))
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", spec.get("module", MODULE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join([_ROOT] + inherited)),
            universal_newlines=True,
        )

    def start(self, spec: Spec) -> About:
        """Make the process open the engine that `spec` describes. Return the process's description of the engine and machine."""
        about: About = self._ask(spec)
        return about

    def one_round(self, n: int) -> Round:
        """Make the process time `n` inferences, and return the samples."""
        reply: Round = self._ask({"n": n})
        return reply

    def _ask(self, request: Union[Spec, RoundRequest]) -> Any:
        """Send one request line and return the reply, a JSON object.

        Raises:
            LatencyError: the process died, hung or sent something else. The message has the end of its stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        hung = threading.Event()

        def end() -> None:
            hung.set()
            self._process.kill()

        watch = threading.Timer(PATIENCE_S, end)
        watch.daemon = True
        watch.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if not line:
            code = self._process.wait()
            if hung.is_set():
                raise LatencyError(
                    f"{self.label}: the measuring process gave no answer in {PATIENCE_S:g} s and was ended"
                )
            self._stderr.seek(0)
            stderr_end = self._stderr.read()[-STDERR_KEPT:].strip()
            how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with code {code}"
            raise LatencyError(f"{self.label}: the measuring process ended {how}:\n{stderr_end}")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise LatencyError(
                f"{self.label}: the measuring process answered {line[:200]!r}, expected a JSON object"
            ) from error

    def close(self) -> None:
        """End the process by closing its stdin. If it does not end within 10 seconds, kill it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


def measure_in_turn(
    specs: Sequence[Spec],
    rounds: int,
    n_per_round: int,
    progress: Optional[Callable[[int], Any]] = None,
) -> List[Measured]:
    """Measure the latency of several engines in rounds. A round times each engine once; every second round in reverse order.

    Args:
        specs: one `messages.Spec` for each engine to measure.
        rounds: number of rounds. An even number cancels linear drift.
        n_per_round: samples per engine and round.
        progress: called with 1 after each round of each engine, rounds * len(specs) times in total.

    Returns:
        The result of each spec, in the same order.

    Raises:
        LatencyError: a process failed. The message has the engine and the end of its stderr. All processes are ended.
    """
    children: List[_Child] = []
    try:
        results: List[Measured] = []
        for spec in specs:  # one at a time, because loading uses the whole machine
            children.append(_Child(spec))
            about = children[-1].start(spec)
            results.append({**about, "samples_ms": [], "rounds_ms": [], "quiet": True, "memory_mib": None})
        for number in range(rounds):
            order = list(range(len(children)))
            if number % 2:
                order.reverse()
            for index in order:
                reply, result = children[index].one_round(n_per_round), results[index]
                result["samples_ms"] += reply["samples_ms"]
                result["rounds_ms"].append(reply["samples_ms"])
                result["quiet"] = result["quiet"] and reply["quiet"]
                result["memory_mib"] = reply.get("memory_mib")
                if progress is not None:
                    progress(1)
        return results
    finally:
        for child in children:
            child.close()
