"""A worker: takes trials of a study and runs each one in a process of its own, until trials or time are over.

The command `search` is a worker, and so is each `search worker study=NAME` that is started on any machine that shares the folders.
With `search.workers=ray`, each task of a Ray cluster is a worker for one trial (`cluster.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from yolo_compress import progress
from yolo_compress.errors import CompressError, EnvironmentLacks, StorageError
from yolo_compress.exits import SIGINT, SIGTERM
from yolo_compress.files.lock import lock
from yolo_compress.recipe.recipe import SearchConfig
from yolo_compress.report.numbers import duration, percent
from yolo_compress.search import kept, levels
from yolo_compress.search.front import Choice, Engine
from yolo_compress.search.machine import check_machine
from yolo_compress.search.sampler import OptunaSampler, Sampler
from yolo_compress.search.space import point_text
from yolo_compress.search.study import (
    CODE_OF_STUDY,
    RESULT,
    SHARED_STORE,
    Outcome,
    Step,
    Study,
    Trial,
    check_files,
    check_storage,
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
STUDY_FAULTS = (CODE_OF_STUDY, StorageError.exit_code)  # exit codes of a trial that is not at fault itself
CODE_OF_TIME = -1000  # instead of an exit code: the time was over

Command = Callable[[Path], Sequence[str]]
Taken = Literal["ended", "none", "over"]  # a trial ended; there is none to give out now; time or study are over


def process(folder: Path) -> Sequence[str]:
    """Return the command that runs the trial in a folder."""
    return [sys.executable, "-m", "yolo_compress.search.trial", str(folder)]


def with_optuna(study: Study) -> Worker:
    """Return a worker that gets its points from Optuna.

    Raises:
        RecipeError: The study in Optuna's storage is of another folder.
        EnvironmentLacks: See `OptunaSampler`.
    """
    search = study.base.search
    assert search is not None
    seed = study.base.run.seed
    sampler = OptunaSampler(
        study.folder, study.name, study.space, study.own, seed=seed, trials=search.trials, storage=search.storage
    )
    with study.locked():
        check_storage(study, sampler.owner)
        if sampler.owner is None:
            sampler.claim(study.file["id"])
    return Worker(study, sampler)


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
            CompressError: The baseline cannot be measured, the first trials all failed, this machine has another processor than the
                study, or a file of the recipe has changed.
        """
        with self._joined():
            while (taken := self._take()) != "over":
                if taken == "none":
                    if not self.study.unfinished():
                        break
                    self._sleep(1.0)  # other workers run the last trials, and may die
        return self.study.choice(self.study.trials())

    def run_one(self) -> Taken:
        """Run at most one trial, after the baseline if it is not measured yet.

        Raises:
            CompressError: As for `run`.
        """
        with self._joined():
            return self._take()

    @contextmanager
    def _joined(self) -> Iterator[None]:
        """Count the time of the block as that of a worker. Before, measure the baseline, unless it is."""
        with self.study.session() as session:
            self._session, self._touched = session, time.monotonic()
            with lock(self.study.folder / "reference" / ".lock", f"the baseline of study {self.study.name}"):
                if not self.study.reference():
                    self._measure_reference()
            check_machine(self.study)
            yield

    def _take(self) -> Taken:
        """Run a trial if there is one to give out, and time for it."""
        if self.study.choice([]).verdict == "dense" or not self._time_for_a_trial():
            return "over"
        with self.study.given_out(self.sampler, self.search.trials) as trial:
            if trial is None:
                return "none"
            if not self._run(trial):
                return "over"
        self._check_failures()
        return "ended"

    @property
    def search(self) -> SearchConfig:
        """Section `search` of the study's recipe."""
        search = self.study.base.search
        assert search is not None
        return search

    # Time

    def _left_s(self) -> float:
        """Return how much of `search.hours` is left."""
        if self.search.hours is None:
            return float("inf")
        touch(self._session)
        return self.search.hours * 3600 - self.study.spent_s()

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
                f"search: {duration(max(left, 0.0))} are left and a trial takes about {duration(expected)}: no more trials"
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
                check_files(self.study)
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
        if outcome is None and code in STUDY_FAULTS:
            self.study.give_back(trial)
            raise CompressError(f"search: no trial can run here: {last_error(trial.folder) or f'exit code {code}'}")
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
        parts.append(f"{len(ended)} of {self.search.trials} trials")
        shown = ", ".join(f"{self.study.goal.text(one['cost'])} {percent(one['retention'])}" for one in now[:6])
        parts.append(f"front: {shown or 'empty'}")
        seconds = [one.outcome["seconds"] for one in ended if one.outcome]
        left = min(self._left_s(), sum(seconds) / len(seconds) * max(0, self.search.trials - len(ended)))
        return "; ".join([*parts, f"about {duration(max(left, 0.0))} left"])

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
                    f"search.hours={self.search.hours:g} are over before the baseline was measured: give more hours"
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
