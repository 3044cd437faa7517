"""Engines measured in turn: one live process an engine, rounds in ABBA order, so that drift meets all of them alike."""

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
_ROOT = str(Path(__file__).resolve().parents[_PACKAGE.count(".") + 1])  # the folder that the package is imported from
PATIENCE_S = 900.0  # for one answer: loading an engine, or one round of a slow network
STDERR_KEPT = 2000  # characters of a failed child's stderr that are reported


class _Child:
    """One measuring process; killed on any failure and at the end."""

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
        """Have it open what the spec names."""
        about: About = self._ask(spec)
        return about

    def one_round(self, n: int) -> Round:
        """Have it time `n` calls."""
        reply: Round = self._ask({"n": n})
        return reply

    def _ask(self, request: Union[Spec, RoundRequest]) -> Any:
        """One request line, one reply, a JSON object; LatencyError with the child's last words if it dies, hangs or talks nonsense."""
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
            words = self._stderr.read()[-STDERR_KEPT:].strip()
            how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with code {code}"
            raise LatencyError(f"{self.label}: the measuring process ended {how}:\n{words}")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise LatencyError(
                f"{self.label}: the measuring process answered {line[:200]!r}, no JSON object"
            ) from error

    def close(self) -> None:
        """End the process: closing its stdin is the request, kill the last resort."""
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
    """Samples of each engine from `rounds` rounds; odd rounds go through the engines backwards.

    Args:
        specs: what is measured.
        rounds: an even number cancels linear drift.
        n_per_round: samples of one engine in one round.
        progress: called with 1 after each round of each engine; rounds * len(specs) times in all.

    Returns:
        What was measured of each spec, in order.

    Raises:
        LatencyError: a process failed; names the engine and carries the end of its stderr. All processes are ended.
    """
    children: List[_Child] = []
    try:
        results: List[Measured] = []
        for spec in specs:  # one at a time: loading is heavy
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
