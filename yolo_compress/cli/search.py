"""`yolo-compress search`: find the recipe that keeps the most mAP within a latency or size. `search status study=NAME` shows it."""

from __future__ import annotations

import json

from yolo_compress import home, preflight, ranks
from yolo_compress.chain import STAGES, plan
from yolo_compress.cli.grammar import Command
from yolo_compress.errors import RecipeError
from yolo_compress.progress import result, say
from yolo_compress.recipe.recipe import Recipe, RunConfig, SearchConfig
from yolo_compress.search import cluster, levels, page, sampler
from yolo_compress.search.document import SearchDocument, document
from yolo_compress.search.machine import check_machine
from yolo_compress.search.study import Study, create, open_study
from yolo_compress.search.worker import with_optuna
from yolo_compress.store.store import Store

MET = ("dense", "reached")


def handle(command: Command) -> int:
    """Run or continue a study, or show one. Return exit code 1 if the study has ended and no engine meets the goal."""
    action, name = command.words[0] if command.words else "", command.options["study"]
    if action and action not in ACTIONS:
        raise RecipeError(
            f"command line: search: got {action!r}, expected {', '.join(ACTIONS)}, or no word to run the search"
        )
    if action in ("status", "report"):
        _check_no_knobs(command)
        study = open_study(name)
        found = page.write(study) if action == "report" else document(study)
        return _answer(study, found, ended=False)
    study = _joined(command, name) if action == "worker" else _begun(command, name)
    sampler.require()
    _run(study, by_hand=action == "worker")
    return _answer(study, page.write(study), ended=True)


ACTIONS = ("status", "worker", "report")


def _begun(command: Command, name: str) -> Study:
    """Make or open the study of the recipe, after all checks that need no training."""
    recipe = command.load()
    if recipe.search is None:
        recipe = recipe.replaced({"search": SearchConfig()})
    assert recipe.search is not None
    _check_device(recipe)
    sampler.require()  # before any image is read
    on_cluster = recipe.search.workers == "ray"
    if on_cluster:
        cluster.require()
    recipe, dataset = preflight.prepare(recipe, Store(home.weights()))
    study = create(name, recipe, dataset)
    if not on_cluster:
        check_machine(study)
    for level in (levels.dense(study.base), *levels.placements(study.base, study.own)):
        stages = plan(level.recipe, dataset, level.target)
        here = [stage for stage in stages if not (on_cluster and STAGES[stage].machine)]  # the nodes check the others
        preflight.check(level.recipe, dataset, here)
    return study


def _joined(command: Command, name: str) -> Study:
    """Open a study as a further worker. Only settings of the machine may be given."""
    allowed = {f"run.{knob}" for knob in RunConfig.MACHINE}
    if other := [key for key, _ in command.overrides if key not in allowed]:
        raise RecipeError(
            f"command line: {other[0]}: a worker takes the recipe of the study, and only {', '.join(sorted(allowed))}"
        )
    study = open_study(name, [*command.overrides])
    _check_device(study.base)
    check_machine(study)
    return study


def _check_device(recipe: Recipe) -> None:
    if len(ranks.devices(recipe.run.device)) > 1:
        raise RecipeError(
            f"run.device={recipe.run.device}: a trial trains on one device: give one GPU, and start `search worker` for each other one"
        )


def _run(study: Study, by_hand: bool) -> None:
    """Be a worker of the study, or start the tasks of its Ray cluster. A worker that was started by hand is a worker in any case."""
    worker = with_optuna(study)
    say(
        f"search: study {study.name} in {study.folder}; `yolo-compress search worker study={study.name}` elsewhere joins it"
    )
    if worker.search.workers == "ray" and not by_hand:
        cluster.run(study)
    else:
        worker.run()


def _check_no_knobs(command: Command) -> None:
    if command.names_recipe:
        raise RecipeError(f"command line: search {command.words[0]} takes only study=NAME")


def _answer(study: Study, found: SearchDocument, ended: bool) -> int:
    result(page.text(found))
    report = study.folder / "report.html"
    if report.is_file():
        result(f"report: {report}")
    if found["command"]:
        result(f"make it: {found['command']}")
    chosen = next((row for row in found["engines"] if row["chosen"]), None)
    answer = {
        "study": study.name,
        "verdict": found["verdict"],
        "line": found["line"],
        "counts": found["counts"],
        "planned": found["planned"],
        "spent_s": found["spent_s"],
        "chosen": chosen,
        "command": found["command"],
        "report": str(report) if report.is_file() else None,
    }
    result(json.dumps(answer))
    return 0 if not ended or found["verdict"] in MET else 1
