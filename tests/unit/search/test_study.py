"""A study of toy trials: nothing is lost or counted twice, whoever dies; time and budget are kept; another recipe is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support import toy_study as toy
from tests.support.toy_study import instant
from yolo_compress.errors import CompressError, EnvironmentLacks, RecipeError, StorageError
from yolo_compress.runtime.backends.tensorrt import cuda
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.errors import RuntimeUnavailable
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.search import kept
from yolo_compress.search.machine import processor
from yolo_compress.search.sampler import Sampler
from yolo_compress.search.study import (
    CODE_OF_STUDY,
    Study,
    check_storage,
    failed,
    open_study,
    touch,
    union_s,
    write_outcome,
)
from yolo_compress.search.worker import Worker

ROOT = Path(__file__).resolve().parents[3]


def start(name: str, **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.toy_study", "work", name],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stderr=subprocess.DEVNULL,
    )


def runs(study: Study) -> Counter[int]:
    """How often each trial's process was started."""
    return Counter({one.number: (one.folder / "runs.txt").read_text().count("\n") for one in study.trials()})


def told(study: Study) -> Counter[str]:
    return Counter(json.loads((study.folder / "sampler.json").read_text()).values())


def test_a_study_runs_to_its_end_and_continues_with_more_trials(home: Path) -> None:
    study = toy.study(home)
    choice = instant(study).run()
    assert len(study.trials()) == 12 and told(study) == {"done": 12}
    assert choice.verdict == "missed" and choice.engine and choice.engine["cost"] < 4.1
    instant(study).run()
    assert set(runs(study).values()) == {1}, "a finished study does nothing"
    more = toy.study(home, "toy", ("search.trials", "14"))
    instant(more).run()
    assert len(more.trials()) == 14 and set(runs(more).values()) == {1}


def test_a_point_is_in_the_recipe_file_and_every_trial_has_another(home: Path) -> None:
    """Trials that all train the same model would not be noticed by their results alone."""
    study = toy.study(home)
    instant(study).run()
    keeps = [one.outcome["engines"][0]["cost"] / 10 for one in study.trials() if one.outcome]
    assert keeps == pytest.approx([one.point["keep_flops"] for one in study.trials()]) and len(set(keeps)) == 12


def test_two_workers_and_kill_9_of_one(home: Path) -> None:
    study = toy.study(home, "toy", ("search.trials", "6"))
    first, second = start("toy", TOY_SECONDS="0.3"), start("toy", TOY_SECONDS="0.3")
    deadline = time.monotonic() + 60
    while not any(one.outcome is None for one in study.trials()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    assert second.wait(120) == 0
    trials = study.trials()
    assert [one.number for one in trials] == list(range(6)) and all(one.outcome for one in trials)
    assert told(study) == {"done": 6} and sorted(
        one["trial"] for one in study.engines(trials) if one["trial"] is not None
    ) == list(range(6))
    assert max(runs(study).values()) <= 2 and sum(one.given for one in trials) <= 7


def test_a_trial_that_kills_its_workers_is_given_out_once_more_and_then_failed(home: Path) -> None:
    study = toy.study(home, "toy", ("search.trials", "3"))
    for _ in range(2):
        assert start("toy", TOY_KILLER="1").wait(60) == -signal.SIGKILL
    assert start("toy", TOY_KILLER="1").wait(60) == 0
    outcomes = {one.number: one.outcome for one in study.trials()}
    assert runs(study)[1] == 2 and outcomes[1] == failed("its workers died 2 times", "")
    assert told(study) == {"done": 2, "failed": 1}


def test_a_result_without_outcome_counts_once_and_runs_no_more(home: Path) -> None:
    """The worker was killed after the trial's process had ended."""
    study = toy.study(home, "toy", ("search.trials", "2"))
    with study.given_out(toy.FileSampler(study.folder), 2) as trial:
        assert trial is not None
        toy.run(trial.folder)
    instant(study).run()
    assert set(runs(study).values()) == {1} and told(study) == {"done": 2}


def test_an_outcome_that_the_sampler_does_not_know_is_told(home: Path) -> None:
    study, states = toy.study(home, "toy", ("search.trials", "2")), {}
    with study.given_out(toy.FileSampler(study.folder), 2) as trial:
        assert trial is not None
        write_outcome(
            trial.folder,
            {"state": "done", "after": "int8", "why": None, "engines": [toy.engine(0, 0.5)], "seconds": 1.0},
        )
    states = told(study)
    assert states == {"running": 1}
    instant(study).run()
    assert told(study) == {"done": 2} and not (study.trials()[0].folder / "runs.txt").exists()


def test_a_point_without_folder_is_run(home: Path) -> None:
    """The worker was killed between asking for a point and writing the folder."""
    study = toy.study(home, "toy", ("search.trials", "2"))
    toy.FileSampler(study.folder).ask()
    instant(study).run()
    assert len(study.trials()) == 2 and told(study) == {"done": 2}


def test_the_hours_are_kept_and_the_trial_is_not_counted(home: Path) -> None:
    study = toy.study(home, "toy", ("search.hours", "0.0005"))  # 1.8 s
    started = time.monotonic()
    worker = Worker(study, toy.FileSampler(study.folder), lambda folder: ["sleep", "60"])
    toy.measure_reference(study)
    worker.run()
    assert time.monotonic() - started < 20
    (trial,) = study.trials()
    assert trial.outcome is None and trial.given == 0, "the end of the time is not a death"
    more = toy.study(home, "toy", ("search.hours", "1"), ("search.trials", "1"))
    instant(more).run()
    assert len(more.trials()) == 1 and more.trials()[0].outcome


def test_no_trial_starts_that_cannot_end_in_time(home: Path) -> None:
    study = toy.study(home, "toy", ("search.hours", "0.01"), ("search.trials", "2"))
    instant(study).run()
    one = study.trials()[0]
    write_outcome(one.folder, {**(one.outcome or failed("", "")), "seconds": 100.0})
    other = study.trials()[1]
    write_outcome(other.folder, {**(other.outcome or failed("", "")), "seconds": 100.0})
    instant(toy.study(home, "toy", ("search.hours", "0.01"), ("search.trials", "3"))).run()
    assert len(study.trials()) == 2


def test_time_in_which_several_workers_ran_counts_once() -> None:
    assert union_s([(0, 10), (5, 12), (20, 21), (1, 2)]) == 13 and union_s([]) == 0


def test_sessions_add_up(home: Path) -> None:
    study = toy.study(home)
    with study.session() as session:
        touch(session)
    assert 0 <= study.spent_s() < 5


def test_a_target_that_the_baseline_meets_needs_no_trial(home: Path) -> None:
    study = toy.study(home, "toy", ("search.latency_ms", "11"), ("search.max_drop", "0.05"))
    assert instant(study).run().verdict == "dense" and study.trials() == []


def test_the_first_trials_fail_all(home: Path) -> None:
    study = toy.study(home)
    toy.measure_reference(study)
    command = [sys.executable, "-c", "import sys; sys.exit('error: the disk is full')"]
    with pytest.raises(CompressError, match="the first 3 trials failed: the disk is full"):
        Worker(study, toy.FileSampler(study.folder), lambda folder: command).run()
    assert told(study) == {"failed": 3}


def test_a_study_of_another_recipe_or_data_is_refused(home: Path) -> None:
    toy.study(home)
    with pytest.raises(RecipeError, match=r"study toy has another recipe, files or data \(prune.lr0: 0.001 -> 0.01\)"):
        toy.study(home, "toy", ("prune.lr0", "0.01"))
    toy.study(home, "toy", ("search.trials", "5"), ("run.threads", "1"))  # neither decides a result
    with pytest.raises(RecipeError, match="data_digest"):
        toy.create("toy", toy.base(home), toy.dataset("e"))


def test_a_study_that_is_not_there_names_the_others(home: Path) -> None:
    toy.study(home)
    with pytest.raises(
        RecipeError, match=r"no study other in .*searches, which has toy. All workers of a study need the same folder"
    ):
        open_study("other")


@pytest.mark.parametrize("name", ["", ".x", "a/b", "store", "../x"])
def test_a_name_that_is_no_folder(home: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="expected a name that can be a folder"):
        open_study(name)


def test_nothing_to_search(home: Path) -> None:
    nothing = [
        (f"search.{knob}", "null")
        for knob in ("criterion", "round_to", "prune_share", "logit_weight", "feature_weight", "box_weight")
    ]
    with pytest.raises(RecipeError, match="there is nothing to search"):
        toy.study(home, "toy", *nothing, ("search.keep_flops", "0.5,0.5"))


def test_a_storage_of_another_study_is_refused(home: Path) -> None:
    study = toy.study(home)
    check_storage(study, study.file["id"])
    with pytest.raises(RecipeError, match="the storage has a study toy of another folder than"):
        check_storage(study, "another")
    toy.FileSampler(study.folder).ask()
    check_storage(study, None)
    with (
        study.given_out(toy.FileSampler(study.folder), 1),
        pytest.raises(RecipeError, match="trials that its storage does not know"),
    ):
        check_storage(study, None)


@pytest.mark.parametrize("joins", ["run", "run_one"])
def test_a_worker_on_another_processor_is_refused(home: Path, joins: str) -> None:
    study = toy.study(home, "toy", ("search.trials", "2"))
    elsewhere = {**toy.engine(None, 1), "processor": "Z80"}
    write_outcome(study.folder / "reference", {**failed("", ""), "state": "done", "engines": [elsewhere]})
    with pytest.raises(RecipeError, match="study toy measures latencies on Z80, this machine has .*: start workers on"):
        getattr(instant(study), joins)()
    assert study.trials() == []


def test_sizes_are_the_same_on_every_processor(home: Path) -> None:
    study = toy.study(home, "toy", ("search.trials", "2"), ("search.cost", "size"), ("search.latency_ms", "null"))
    there = {**toy.engine(None, 1), "processor": None, "latency_ms": None}
    write_outcome(study.folder / "reference", {**failed("", ""), "state": "done", "engines": [there]})
    instant(study).run()
    assert told(study) == {"done": 2}


def test_engines_of_a_gpu_are_tied_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver_problem", lambda: None)
    monkeypatch.setattr(cuda, "device_name", lambda: "Orin (sm_87)")
    assert processor("tensorrt") == "Orin (sm_87)" and processor("openvino") == cpu_model()
    monkeypatch.setattr(cuda, "driver_problem", lambda: "no CUDA driver")
    with pytest.raises(RuntimeUnavailable, match="tensorrt needs a GPU: no CUDA driver; check nvidia-smi"):
        processor("tensorrt")


@pytest.mark.parametrize(
    ("knob", "value"),
    [("prune.criterion", "own.py:f"), ("distill.feature_loss", "own.py:f"), ("baseline.weights", "own.py")],
)
def test_a_file_that_changes_under_its_name_is_noticed(home: Path, knob: str, value: str) -> None:
    (home / "own.py").write_text("first")
    study = toy.study(home, "toy", (knob, value))
    worker = instant(study)
    assert worker.run_one() == "ended"
    (home / "own.py").write_text("second")
    with pytest.raises(RecipeError, match=f"{knob}: the file has changed since study toy was begun: restore it"):
        worker.run_one()
    assert [one.given for one in study.trials()] == [1, 0], "no trial ran with the other file"
    with pytest.raises(RecipeError, match=rf"study toy has another recipe, files or data \(files.{knob}: \w+ -> \w+\)"):
        toy.study(home, "toy", (knob, value))
    (home / "own.py").write_text("first")
    assert worker.run_one() == "ended"


@pytest.mark.parametrize("code", [CODE_OF_STUDY, StorageError.exit_code])
def test_a_fault_of_the_study_or_machine_is_no_failed_trial(
    home: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    study = toy.study(home, "toy", ("search.trials", "2"))
    worker = instant(study)
    assert worker.run_one() == "ended"

    def ends(folder: Path, *_: object) -> int:
        (folder / "log.txt").write_text("error: the images are gone\n")
        return code

    monkeypatch.setattr(worker, "_process", ends)
    with pytest.raises(CompressError, match="^search: no trial can run here: the images are gone$"):
        worker.run_one()
    assert told(study) == {"done": 1, "running": 1} and [one.given for one in study.trials()] == [1, 0]


def test_a_worker_without_the_runtime_takes_no_trial(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = toy.study(home, "toy")
    toy.measure_reference(study)
    monkeypatch.setattr(BACKENDS[study.goal.runtime], "probe", staticmethod(lambda: "not here; pip install it"))
    with pytest.raises(EnvironmentLacks, match=r"\S+: not here; pip install it$"):
        instant(study).run_one()
    assert study.trials() == []


def test_links_of_engines_off_the_front_are_released(home: Path) -> None:
    study = toy.study(home, "toy", ("search.trials", "2"))
    instant(study).run()
    folders = [home / "weights" / kept.link_name("toy", number, "int8") for number in (0, 1, 9)]
    for folder in [*folders, home / "weights" / "toy-other"]:
        folder.mkdir(parents=True)
        (folder / "qat").symlink_to("../store/x")
    loser = study.trials()[1]
    write_outcome(
        loser.folder, {**(loser.outcome or failed("", "")), "engines": [{**toy.engine(1, 0.29), "cost": 9.9}]}
    )
    kept.release(study)
    assert folders[0].is_dir(), "on the front"
    assert not folders[1].exists(), "off the front"
    assert folders[2].is_dir() and (home / "weights" / "toy-other").is_dir(), "a trial that has not ended, and no trial"


def test_the_sampler_of_the_toys_is_a_sampler(home: Path) -> None:
    sampler: Sampler = toy.FileSampler(home)
    assert sampler.ask()[0] == 0 and list(sampler.waiting()) == [0]
