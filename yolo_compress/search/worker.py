"""A worker: takes trials of a study and runs each one in a process of its own, until trials or time are over.

The command `search` is a worker, and so is each `search worker study=NAME` that is started on any machine that shares the folders.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from yolo_compress import progress
from yolo_compress.errors import CompressError, EnvironmentLacks
from yolo_compress.exits import SIGINT, SIGTERM
from yolo_compress.files.lock import lock
from yolo_compress.recipe.recipe import SearchConfig
from yolo_compress.report.numbers import percent
from yolo_compress.search import kept, levels
from yolo_compress.search.front import Choice, Engine
from yolo_compress.search.sampler import Sampler
from yolo_compress.search.space import Point
from yolo_compress.search.study import (
    RESULT,
    SHARED_STORE,
    Outcome,
    Step,
    Study,
    Trial,
    failed,
    last_level,
    read_outcome,
    read_trial,
    touch,
    write_levels,
    write_outcome,
    write_plan,
)

POLL_S = 0.2
TOUCH_S = 10.0
PATIENCE_S = 30.0  # time for a process to end after SIGTERM
FAILURES_MOST = 3  # so many failures in a row, and no success, are no property of a point
ENDED_BY = {SIGINT: "SIGINT", SIGTERM: "SIGTERM"}  # exit code of a process that ended in good order -> the signal
CODE_OF_TIME = -1000  # instead of an exit code: the time was over

Command = Callable[[Path], Sequence[str]]


def process(folder: Path) -> Sequence[str]:
    """Return the command that runs the trial in a folder."""
    return [sys.executable, "-m", "yolo_compress.search.trial", str(folder)]


class Worker:
    """Runs trials of one study.

    Attributes:
        study: The study.
        sampler: Gives the points.
        command: Makes the command line that runs a trial, from its folder.
    """

    def __init__(self, study: Study, sampler: Sampler, command: Command = process) -> None:
        self.study, self.sampler, self.command = study, sampler, command

    def run(self) -> Choice:
        """Run trials until there is none left or the time is over. Return the choice.

        Raises:
            CompressError: The baseline cannot be measured, or the first trials all failed.
        """
        with self.study.session() as session:
            self._session, self._touched = session, time.monotonic()
            with lock(self.study.folder / "reference" / ".lock", f"the baseline of study {self.study.name}"):
                if not self.study.reference():
                    self._measure_reference()
            choice = self.study.choice([])
            if choice.verdict == "dense":
                return choice
            while self._time_for_a_trial():
                with self.study.given_out(self.sampler, self._search.trials) as trial:
                    if trial is None:
                        if not self._others_run():
                            break
                        self._sleep(1.0)
                        continue
                    if not self._run(trial):
                        break
                self._check_failures()
        return self.study.choice(self.study.trials())

    @property
    def _search(self) -> SearchConfig:
        search = self.study.base.search
        assert search is not None
        return search

    # Time

    def _left_s(self) -> float:
        """Return how much of `search.hours` is left."""
        if self._search.hours is None:
            return float("inf")
        touch(self._session)
        return self._search.hours * 3600 - self.study.spent_s()

    def _time_for_a_trial(self) -> bool:
        """Return whether a whole trial is expected to end in time. The expectation is the median of the trials that were done."""
        left = self._left_s()
        if left == float("inf"):
            return True
        done = sorted(
            one.outcome["seconds"] for one in self.study.trials() if one.outcome and one.outcome["state"] == "done"
        )
        expected = done[len(done) // 2] if done else 0.0
        if left <= expected:
            progress.say(
                f"search: {clock(max(left, 0.0))} are left and a trial takes about {clock(expected)}: no more trials"
            )
        return left > expected

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        if time.monotonic() - self._touched > TOUCH_S:
            touch(self._session)
            self._touched = time.monotonic()

    # Trials

    def _run(self, trial: Trial) -> bool:
        """Run a trial to its outcome. Return False if the time was over before."""
        progress.say(f"search: trial {trial.number}: {point_text(trial.point)}")
        seen = 0
        deadline = time.monotonic() + self._left_s()

        def watch() -> None:
            nonlocal seen
            figures = read_trial(trial.folder).figures
            for name in list(figures)[seen:]:
                one = figures[name]
                measured = f"{self.study.goal.text(one['cost'])}, {percent(one['retention'])} of mAP50-95"
                progress.say(f"search: trial {trial.number} after {name}: {measured}")
            seen = len(figures)

        code = 0
        if read_outcome(trial.folder, RESULT) is None:  # else its worker was killed after the process had ended
            try:
                code = self._process(trial.folder, deadline, watch)
            except BaseException:
                self.study.give_back(trial)
                raise
        outcome = read_outcome(trial.folder, RESULT)
        if outcome is None and code == CODE_OF_TIME:
            self.study.give_back(trial)
            progress.say(f"search: the time is over; trial {trial.number} is not counted")
            return False
        if outcome is None and (code < 0 or code in ENDED_BY):
            name = signal.Signals(-code).name if code < 0 else ENDED_BY[code]
            progress.say(f"search: trial {trial.number} was ended by {name}")
            return True  # it is given out again, once
        if outcome is None:
            outcome = failed(last_error(trial.folder) or f"exit code {code}", last_level(read_trial(trial.folder)))
        self._finish(trial, outcome)
        return True

    def _finish(self, trial: Trial, outcome: Outcome) -> None:
        now = kept.keep(self.study, trial, outcome["engines"])
        self.study.finish(trial, outcome, self.sampler)
        kept.release(self.study)
        progress.say(self._progress_line(trial, outcome, now))

    def _progress_line(self, trial: Trial, outcome: Outcome, now: Sequence[Engine]) -> str:
        trials = self.study.trials()
        ended = [one for one in trials if one.outcome]
        parts = [
            f"search: trial {trial.number} {outcome['state']}" + (f" ({outcome['why']})" if outcome["why"] else "")
        ]
        parts.append(f"{len(ended)} of {self._search.trials} trials")
        shown = ", ".join(f"{self.study.goal.text(one['cost'])} {percent(one['retention'])}" for one in now[:6])
        parts.append(f"front: {shown or 'empty'}")
        seconds = [one.outcome["seconds"] for one in ended if one.outcome]
        left = min(self._left_s(), sum(seconds) / len(seconds) * max(0, self._search.trials - len(ended)))
        return "; ".join([*parts, f"about {clock(max(left, 0.0))} left"])

    def _others_run(self) -> bool:
        """Return whether trials without an outcome exist: other workers run them, and may die."""
        return any(one.outcome is None for one in self.study.trials())

    def _check_failures(self) -> None:
        """Raise if the first trials all failed: then the cause is not their points."""
        outcomes = [one.outcome for one in self.study.trials() if one.outcome]
        if len(outcomes) >= FAILURES_MOST and all(one["state"] == "failed" for one in outcomes):
            raise CompressError(f"search: the first {len(outcomes)} trials failed: {outcomes[-1]['why']}")

    # The reference

    def _measure_reference(self) -> None:
        """Run and measure the unpruned baseline, and the stages that all trials share, in the shared store."""
        folder, base = self.study.folder / "reference", self.study.base
        level = levels.dense(base)
        (step,) = write_levels(folder, [level], final=True)
        step = self._renamed(folder, step, f"{self.study.name}-reference")
        before: list[Step] = []
        for stage in ("teacher", "sparsify"):
            if getattr(base, stage) is not None:
                (shared,) = write_levels(
                    folder, [levels.Level(f"{self.study.name}-shared", levels.shared(base), stage)]
                )
                before.append(shared)
        write_plan(folder, {"store": SHARED_STORE, "before": before, "steps": [step]})
        progress.say("search: the unpruned baseline, which all trials are compared with")
        code = self._process(folder, time.monotonic() + self._left_s(), lambda: None)
        outcome = read_outcome(folder, RESULT)
        if outcome is None:
            if code == CODE_OF_TIME:
                raise CompressError(
                    f"search.hours={self._search.hours:g} are over before the baseline was measured: give more hours"
                )
            raise EnvironmentLacks(
                f"search: the baseline cannot be measured: {last_error(folder) or f'exit code {code}'}"
            )
        write_outcome(folder, outcome)

    def _renamed(self, folder: Path, step: Step, name: str) -> Step:
        os.replace(folder / step["file"], folder / f"{name}.yaml")
        return {**step, "file": f"{name}.yaml"}

    # Processes

    def _process(self, folder: Path, deadline: float, watch: Callable[[], None]) -> int:
        """Run the process of a folder. Its output goes to log.txt. Return its exit code, or `CODE_OF_TIME` after the deadline.

        The process holds the other end of a pipe, so it ends when this worker dies.
        """
        with (folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(self.command(folder), stdin=subprocess.PIPE, stdout=log, stderr=log)
            try:
                while child.poll() is None:
                    if time.monotonic() > deadline:
                        _end(child)
                        return CODE_OF_TIME
                    self._sleep(POLL_S)
                    watch()
                return child.returncode
            finally:
                _end(child)
                if child.stdin:
                    child.stdin.close()


def point_text(point: Point) -> str:
    """Return a point as text: "keep_flops=0.41 criterion=obs"."""
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in point.items()
    )


def clock(seconds: float) -> str:
    """Return a time as text: "2:10 h", or "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def last_error(folder: Path) -> str | None:
    """Return the last line of a trial's log that starts with `error:`, without that word."""
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
