"""The command line: one verb a stage, plus run, bundle, predict, ab, status, check, cfg, lint, fetch and gc.

Progress and errors go to stderr. Stdout holds the answer: a table where there is one, and as its last line one JSON document.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from yolo_compress.cli import grammar
from yolo_compress.errors import EnvironmentLacks, Terminated
from yolo_compress.exits import SIGINT, SIGTERM, explain
from yolo_compress.progress import notice, result

WRITTEN = {"out", "state"}  # options that name what a verb writes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (errors.py and exits.py list them)."""
    signal.signal(signal.SIGTERM, _terminate)
    verb = ""
    try:
        command = grammar.parse(sys.argv[1:] if argv is None else argv)
        verb = command.verb
        _check_outside_store(command)
        return VERBS.get(verb, _stage)(command)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        return explain(error, verb)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _check_outside_store(command: grammar.Command) -> None:
    """Refuse to write into an artefact, by whatever verb."""
    from yolo_compress import home
    from yolo_compress.store.store import Store

    for option in WRITTEN & command.options.keys():
        Store(home.weights()).check_outside(Path(command.options[option]), option)


def _load(command: grammar.Command) -> Any:
    from yolo_compress.recipe.recipe import load

    return load(command.recipe, command.overrides)


def _init(command: grammar.Command) -> int:
    from yolo_compress.cli import init

    made = init.run(init.order(command.options, command.overrides))
    result(made.pop("text"))
    result(f"written to {made['recipe']}; next:")
    for line in made["next"]:
        result(f"  {line}")
    result(json.dumps(made))
    return 0


def _stage(command: grammar.Command) -> int:
    """A stage and what it needs; `run` goes up to the report."""
    from yolo_compress import pipeline

    recipe = _load(command)
    if command.dry_run:
        return _dry_run(recipe)
    if "add" in command.options:
        return _report_over(recipe, command)
    target = "report" if command.verb == "run" else command.verb
    artifact = pipeline.run(recipe, target, wait=command.wait, again=command.force)
    answer: dict[str, Any] = {
        "recipe": recipe.name,
        "stage": artifact.stage,
        "artifact": str(artifact.path),
        "fingerprint": artifact.fingerprint,
        "metrics": {name: value for name, value in artifact.metrics.items() if name != "table"},
    }
    if target == "bench":
        from yolo_compress.report.summary import bench_text

        result(bench_text(recipe.name, artifact.metrics["rows"]))
    if target == "report":
        result(artifact.metrics["table"])
        html = artifact.file("report.html")
        result(f"report: {html}")
        answer["report"] = str(html)
    result(json.dumps(answer))
    return 0 if artifact.metrics.get("gate", {}).get("passed", True) else 1


def _report_over(recipe: Any, command: grammar.Command) -> int:
    """The report with the rows of other machines beside it, in a folder of its own."""
    from yolo_compress import home, pipeline
    from yolo_compress.recipe import folder as recipe_folder

    out = Path(command.options.get("out", f"report-{recipe_folder.label(home.weights(), recipe)}"))
    metrics = pipeline.report_over(recipe, list(_files(command.options["add"])), out, wait=command.wait)
    result(metrics.pop("table"))
    result(f"report: {out / 'report.html'}")
    result(json.dumps({"recipe": recipe.name, "report": str(out / "report.html"), "metrics": metrics}))
    return 0 if metrics["gate"]["passed"] else 1


def _files(text: str) -> Iterator[Path]:
    """The files of a list with commas; where a file's name has commas itself, the longest name of a file that exists counts."""
    parts = text.split(",")
    while parts:
        names = {count: ",".join(parts[:count]) for count in range(len(parts), 0, -1)}
        count = next((count for count, name in names.items() if os.path.isfile(name)), 1)
        if names[count]:
            yield Path(names[count])
        del parts[:count]


def _dry_run(recipe: Any) -> int:
    """The plan of `prune` on what there is, and nothing written."""
    from yolo_compress import pipeline

    plan = pipeline.dry_run(recipe)
    result(plan["table"])
    figures = {name: value for name, value in plan.items() if name != "table"}
    result(json.dumps({"recipe": recipe.name, **figures}))
    return 0


def _probe(command: grammar.Command) -> int:
    from yolo_compress import pipeline

    folder = pipeline.probe(_load(command), command.options["out"])
    quoted = shlex.quote(str(folder))
    result(
        f"on the robot: python3 -m yolo_compress.runtime.measure.layer_times {quoted} --runtime RUNTIME > table.json"
    )
    result("then here: prune.latency_ms=MS prune.latency_table=table.json")
    result(json.dumps({"probe": str(folder)}))
    return 0


def _status(command: grammar.Command) -> int:
    from yolo_compress import pipeline

    recipe = _load(command)
    rows = list(pipeline.status(recipe))
    for row in rows:
        result(f"{row.stage:<9} {row.state}" + "".join(f"\n{'':<10}{line}" for line in row.why))
    result(json.dumps({"recipe": recipe.name, "stages": {row.stage: row.state for row in rows}}))
    return 0


def _check(command: grammar.Command) -> int:
    from yolo_compress import home, pipeline
    from yolo_compress.cli import check
    from yolo_compress.store.store import Store

    machine, lacks = check.machine()
    for name, text in machine.items():
        result(f"{name:<12} {text}")
    if not _recipe_given(command):
        result(f"{'data':<12} none given; data.yaml=my.yaml looks at it too")
        result(json.dumps({"machine": machine, "lacks": lacks}))
        return _lacks(lacks)
    recipe, dataset = pipeline.prepare(_load(command), Store(home.weights()))
    result(
        f"{'data':<12} {dataset.yaml}: {len(dataset.train)} train, {len(dataset.val)} val, {len(dataset.names)} classes"
    )
    for note in [*dataset.notes, *dataset.skipped]:
        result(f"{'':<12} {note}")
    result(json.dumps({"recipe": recipe.name, "machine": machine, "data": dataset.digest, "lacks": lacks}))
    return _lacks(lacks)


def _lacks(lacks: list[str]) -> int:
    if lacks:
        raise EnvironmentLacks("; ".join(lacks))
    return 0


def _cfg(command: grammar.Command) -> int:
    result(_load(command).dump().rstrip("\n"))
    return 0


def _lint(command: grammar.Command) -> int:
    from yolo_compress.lint.isolated import check_apart
    from yolo_compress.lint.targets import DEFAULT

    text, document = check_apart(Path(command.words[0]), command.options.get("target", DEFAULT))
    result(text)
    result(json.dumps(document))
    return 1 if document["error"] else 0


def _predict(command: grammar.Command) -> int:
    from yolo_compress.cli import predict

    summary = predict.run(predict.settings(command.options))
    result(json.dumps(summary))
    if ended := summary["ended_by"]:
        kept = f"; their lines are in {summary['out']}" if summary["out"] else ""
        notice(
            f"{ended} after {summary['pictures'] + summary['unreadable']} pictures{kept}; the others were not looked at"
        )
        return SIGINT if ended == "interrupted" else SIGTERM
    predict.complain(summary)
    return 0


def _rollout(command: grammar.Command) -> int:
    from yolo_compress.cli import rollout

    document = rollout.run(command.options, command.wait)
    result(rollout.text(document))
    result(json.dumps(document))
    return 1 if document["verdict"]["status"] == "abort" else 0


def _bundle(command: grammar.Command) -> int:
    from yolo_compress.bundle import make

    summary = make.make(_load(command), make.order(command.options), wait=command.wait)
    result(f"on the robot, in {command.options['out']}: python3 build.py, python3 bench.py, python3 detect.py SOURCE")
    result(json.dumps(summary))
    return 0


def _keygen(command: grammar.Command) -> int:
    from yolo_compress.bundle.keys import keygen

    made = keygen(Path(command.options["out"]))
    result(f"on the robot: install {made['public_key']} as {made['pin_as']}; keep {made['key']} off every robot")
    result(json.dumps(made))
    return 0


def _ab(command: grammar.Command) -> int:
    from yolo_compress.cli import ab

    document = ab.run(ab.settings(command.options))
    result(ab.text(document))
    result(json.dumps(document))
    return 0 if document["verdict"]["status"] == "pass" else 1


def _fetch(command: grammar.Command) -> int:
    from yolo_compress.cli.fetch import fetch

    for name in command.words:
        result(str(fetch(name)))
    return 0


def _gc(command: grammar.Command) -> int:
    """Drop artefacts that neither the recipe given nor a friendly name refers to, and nothing that can be continued."""
    from yolo_compress import home, pipeline
    from yolo_compress.store import collect
    from yolo_compress.store.store import Store

    store = Store(home.weights())
    recipe = _load(command) if _recipe_given(command) else None
    with store.lock("gc", command.wait):
        removed = collect.gc(store, pipeline.referred(store, recipe))
        interrupted = collect.interrupted(store)
    for path in removed:
        result(f"removed {path}")
    for path, size in interrupted.items():
        result(f"kept {path} ({size / 2**20:.1f} MiB): its stage was interrupted and can continue; rm -r deletes it")
    answer = {
        "removed": len(removed),
        "mib": _mib(removed),
        "interrupted": len(interrupted),
        "kept_mib": _mib(interrupted),
    }
    result(json.dumps(answer))
    return 0


def _recipe_given(command: grammar.Command) -> bool:
    return bool(command.overrides) or command.recipe != grammar.DEFAULT_RECIPE


def _mib(sizes: Mapping[Any, int]) -> float:
    return round(sum(sizes.values()) / 2**20, 1)


def _help(command: grammar.Command) -> int:
    from yolo_compress.cli.helptext import help_text

    result(help_text(command.words[0] if command.words else None, command.options.get("all") == "true"))
    return 0


def _version(command: grammar.Command) -> int:
    from yolo_compress import __version__

    result(__version__)
    return 0


VERBS: dict[str, Callable[[grammar.Command], int]] = {
    "init": _init,
    "status": _status,
    "check": _check,
    "cfg": _cfg,
    "probe": _probe,
    "lint": _lint,
    "predict": _predict,
    "rollout": _rollout,
    "bundle": _bundle,
    "keygen": _keygen,
    "ab": _ab,
    "fetch": _fetch,
    "gc": _gc,
    "help": _help,
    "version": _version,
}
