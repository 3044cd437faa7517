"""The process of a trial, with stages that take milliseconds: what it runs, in which store, and what stays of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import toy_study as toy
from tests.support.fake_chain import Chain, Killed, fake_chain
from yolo_compress import home, preflight
from yolo_compress.cli.main import main
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import RecipeError
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.search import kept, levels
from yolo_compress.search.front import Engine, choose, front
from yolo_compress.search.levels import Figures
from yolo_compress.search.measure import Timing
from yolo_compress.search.study import (
    RESULT,
    Outcome,
    Study,
    read_outcome,
    read_trial,
    write_levels,
    write_outcome,
    write_plan,
)
from yolo_compress.search.trial import Run
from yolo_compress.search.worker import Worker
from yolo_compress.store.entries import entries
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store


def done(trial: Run) -> Outcome:
    return trial.run(trial.prepared())


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    monkeypatch.setenv("YOLO_COMPRESS_HOME", str(tmp_path))
    with fake_chain(tmp_path) as made:
        made.ran = []
        monkeypatch.setattr(Run, "_level", _level)
        monkeypatch.setattr(Run, "_engine", _engine)
        yield made


def _level(run: Run, step: dict[str, object], recipe: Recipe, *_: object) -> Figures:
    """The retention falls with the trial's number, and the cost is that of the toy engine."""
    assert recipe.prune and recipe.prune.keep_flops
    return {"retention": 0.9, "low": 0.8, "high": 0.95, "cost": 10 * recipe.prune.keep_flops}


def _engine(run: Run, step: dict[str, object], precision: str, recipe: Recipe, *_: object) -> Engine:
    return toy.engine(run.number, (recipe.prune and recipe.prune.keep_flops) or 1.0, str(step["name"]))


def reference(study: Study) -> None:
    folder = study.folder / "reference"
    (step,) = write_levels(folder, [levels.dense(study.base)], final=True)
    write_plan(folder, {"store": "shared", "before": [], "steps": [step]})
    write_outcome(folder, done(Run(study, folder, None)))


def trial(study: Study, sampler: toy.FileSampler) -> int:
    """Run one trial as a worker does, in this process."""
    with study.given_out(sampler, 99) as given:
        assert given is not None
        outcome = done(Run(study, given.folder, given.number))
        write_outcome(given.folder, outcome, RESULT)
        kept.keep(study, given, outcome["engines"])
        study.finish(given, outcome, sampler)
        kept.release(study)
        return given.number


def stages(chain: Chain) -> list[str]:
    assert chain.ran is not None
    return [stage for stage, _ in chain.ran]


def in_store(store: Store) -> list[str]:
    return sorted(entry.stage for entry in entries(store.folder))


def test_the_baseline_is_computed_once_for_all_trials(chain: Chain) -> None:
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "null"))
    sampler = toy.FileSampler(study.folder)
    reference(study)
    for _ in range(3):
        trial(study, sampler)
    assert stages(chain).count("baseline") == 1, "by the stages that ran"
    shared = Store(home.weights())
    assert in_store(shared).count("baseline") == 1, "by the shared store"
    (baseline,) = (shared.find("baseline", one.fingerprint) for one in _linked(shared, "baseline"))
    assert baseline is not None
    for prune in _linked(shared, "prune"):
        assert prune.manifest.inputs["baseline"] == baseline.manifest.content, "all trials pruned its bytes"


def _linked(store: Store, stage: str) -> list[Artifact]:
    found = {one.fingerprint: one for name in store.recipes() if (one := store.linked(name, stage))}
    return list(found.values())


def test_levels_run_in_order_and_the_engines_share_one_model(chain: Chain) -> None:
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "null"))
    reference(study)
    chain.ran = []
    trial(study, toy.FileSampler(study.folder))
    cut, short, full = ["prune", "qat", "export", "engine"], ["prune", "distill"], ["prune", "distill"]
    engines = ["qat", "export", "engine"] * 2  # int8 and int8-0.01
    assert stages(chain) == [*cut, *short, *full, *engines]


@pytest.fixture
def command(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """The chain, for the verb `search`: trials run in this process, and their points come from a file."""

    def process(worker: Worker, folder: Path, deadline: float, watch: object) -> int:
        number = int(folder.name) if folder.parent.name == "trials" else None
        write_outcome(folder, done(Run(worker.study, folder, number)), RESULT)
        return 0

    monkeypatch.setattr(Worker, "_process", process)
    monkeypatch.setattr("yolo_compress.search.sampler.require", lambda: None)
    monkeypatch.setattr(
        "yolo_compress.cli.search.with_optuna", lambda study: Worker(study, toy.FileSampler(study.folder))
    )
    (chain.folder / "toy.yaml").write_text(toy.RECIPE)
    return chain


def test_the_command_trains_nothing_if_the_baseline_meets_the_goal(
    command: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "recipe=toy.yaml", "study=s", "search.latency_ms=11", "search.max_drop=0.05"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["verdict"] == "dense" and answer["counts"]["done"] == 0
    assert "prune" not in stages(command) and (home.searches() / "s" / "s-chosen.yaml").is_file()


def test_the_command_says_what_stands_in_the_way(command: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search.cost=size", "search.size_mib=0.1", "search.trials=2"]
    assert main(["search", "recipe=toy.yaml", "study=t", *words]) == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["verdict"] == "missed" and "The size stands in the way" in answer["line"]
    assert answer["counts"] == {"done": 0, "stopped": 2, "failed": 0, "open": 0}, "above the limit after `cut`"
    assert "distill" not in stages(command)


@pytest.mark.parametrize(("cost", "expected"), [("size", (3.5, 3.5, None)), ("latency", (2.0, 3.5, Timing(2.0, True)))])
def test_the_cost_of_an_engine(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, cost: str, expected: tuple[object, ...]
) -> None:
    study = toy.study(chain.folder, "toy", ("search.cost", cost), ("search.latency_ms", "null"))
    reference(study)
    row = {"folder": "compressed/onnxruntime-int8", "precision": "int8", "size_mib": 3.5, "reason": None}
    monkeypatch.setattr("yolo_compress.search.trial.engine_rows", lambda artifact: [{**row, "folder": "x"}, row])
    monkeypatch.setattr(
        "yolo_compress.search.measure.timed", lambda engine, *_: Timing(2.0, engine.name == "onnxruntime-int8")
    )
    run = Run(study, study.folder / "reference", None)
    made = {"engine": SimpleNamespace(path=Path("engine"))}
    assert run._cost("int8", study.base, toy.dataset(), made) == expected


def test_a_trial_above_the_limit_trains_nothing(chain: Chain) -> None:
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "1"))  # the toy's fastest takes 3 ms
    reference(study)
    chain.ran = []
    number = trial(study, toy.FileSampler(study.folder))
    outcome = read_trial(study.folder / "trials" / f"{number:04d}").outcome
    assert outcome and (outcome["state"], outcome["after"], outcome["engines"]) == ("stopped", "cut", [])
    assert outcome["why"] == "3 ms is above the limit of 1 ms" and "distill" not in stages(chain)


def test_gc_keeps_the_front_and_only_the_front(chain: Chain) -> None:
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "null"), ("search.int8_max_drop", "null"))
    sampler, shared = toy.FileSampler(study.folder), Store(home.weights())
    reference(study)
    for _ in range(2):
        trial(study, sampler)
    assert main(["gc"]) == 0
    assert in_store(shared).count("distill") == 2 and not list((study.folder / "trials").glob("*/store"))
    loser = read_trial(study.folder / "trials" / "0000")  # as if a better trial had come
    assert loser.outcome is not None
    write_outcome(loser.folder, {**loser.outcome, "engines": [{**loser.outcome["engines"][0], "cost": 99.0}]})
    kept.release(study)
    assert main(["gc"]) == 0
    assert in_store(shared).count("distill") == 1 and in_store(shared).count("baseline") == 1
    assert not (home.weights() / "toy-0000-int8").exists() and (home.weights() / "toy-0001-int8" / "distill").is_dir()


def test_the_chosen_engine_is_kept_off_the_front_too(chain: Chain) -> None:
    """Without an interval the front is the cheapest engine alone, and another one may keep more."""
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "null"), ("search.int8_max_drop", "null"))
    sampler = toy.FileSampler(study.folder)
    reference(study)
    for number, (cost, retention) in enumerate(((3.0, 0.5), (4.0, 0.99))):
        trial(study, sampler)
        one = read_trial(study.folder / "trials" / f"{number:04d}")
        assert one.outcome is not None
        changed: Engine = {**one.outcome["engines"][0], "cost": cost, "retention": retention, "low": None}
        write_outcome(one.folder, {**one.outcome, "engines": [changed]})
    engines = study.engines(study.trials())
    chosen = choose(engines, study.goal).engine
    assert chosen is not None and chosen["trial"] == 1 and chosen not in front(engines)
    kept.release(study)
    assert (home.weights() / "toy-0001-int8" / "distill").is_dir()


def test_a_trial_without_the_baseline_of_the_study_is_refused(chain: Chain) -> None:
    """Else it would train a baseline of its own, and be compared with that."""
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "null"))
    reference(study)
    for artifact in _linked(Store(home.weights()), "baseline"):
        shutil.rmtree(artifact.path)
    chain.ran = []
    with pytest.raises(RecipeError, match="the results of baseline that study toy compares with are gone"):
        trial(study, toy.FileSampler(study.folder))
    assert stages(chain) == []


def test_a_trial_that_was_interrupted_continues_from_its_store(chain: Chain) -> None:
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "null"))
    sampler = toy.FileSampler(study.folder)
    reference(study)
    with study.given_out(sampler, 99) as given:
        assert given is not None
        chain.stop_after = 2
        with pytest.raises(Killed):
            done(Run(study, given.folder, given.number))
    assert read_outcome(given.folder) is None
    chain.stop_after, chain.ran = None, []
    assert trial(study, sampler) == given.number
    assert chain.ran[0] == ("prune", 2), "the epochs before the kill are not run again"


def test_the_data_is_prepared_by_the_cache_of_the_shared_store(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    study = toy.study(chain.folder, "toy", ("search.latency_ms", "null"))
    reference(study)
    seen: list[Path] = []
    load = preflight._load_dataset

    def noted(recipe: Recipe, store: Store) -> Dataset:
        seen.append((store.root / ".cache").resolve())
        return load(recipe, store)

    with monkeypatch.context() as patch:  # undone before the chain undoes its own
        patch.setattr(preflight, "_load_dataset", noted)
        trial(study, toy.FileSampler(study.folder))
    assert set(seen) == {(home.weights() / ".cache").resolve()}
