"""The verbs that run a stage, such as `yolo-compress prune`. Earlier stages run first if needed; `run` runs all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yolo_compress import home, pipeline, ranks
from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result
from yolo_compress.recipe import folder
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.report.as_text import bench_text


def handle(command: Command) -> int:
    """Run a stage and all stages that it needs. Return exit code 1 if the report's gate fails."""
    recipe = command.load()
    if command.dry_run:
        return _dry_run(recipe)
    if "add" in command.options:
        return _report_over(recipe, command)
    target = "report" if command.verb == "run" else command.verb
    artifact = pipeline.run(recipe, target, wait=command.wait, again=command.force)
    if ranks.rank() > 0:
        return 0  # only rank 0 prints the result
    answer: dict[str, Any] = {
        "recipe": recipe.name,
        "stage": artifact.stage,
        "artifact": str(artifact.path),
        "fingerprint": artifact.fingerprint,
        "metrics": {name: value for name, value in artifact.metrics.items() if name != "table"},
    }
    if target == "bench":
        result(bench_text(recipe.name, artifact.metrics["rows"]))
    if target == "report":
        result(artifact.metrics["table"])
        html = artifact.file("report.html")
        result(f"report: {html}")
        answer["report"] = str(html)
    result(json.dumps(answer))
    return 0 if artifact.metrics.get("gate", {}).get("passed", True) else 1


def _dry_run(recipe: Recipe) -> int:
    """Print which channels `prune` would remove from the present model. Nothing is written."""
    plan = pipeline.dry_run(recipe)
    result(plan["table"])
    result(json.dumps({"recipe": recipe.name, **{key: value for key, value in plan.items() if key != "table"}}))
    return 0


def _report_over(recipe: Recipe, command: Command) -> int:
    """Write a copy of the report that also shows the measurements of other machines."""
    out = Path(command.options.get("out", f"report-{folder.label(home.weights(), recipe)}"))
    metrics = pipeline.report_over(recipe, list(file_list(command.options["add"])), out, wait=command.wait)
    result(metrics.pop("table"))
    result(f"report: {out / 'report.html'}")
    result(json.dumps({"recipe": recipe.name, "report": str(out / "report.html"), "metrics": metrics}))
    return 0 if metrics["gate"]["passed"] else 1


def file_list(text: str) -> Iterator[Path]:
    """Yield the files of a comma-separated list. A file name may contain commas: the longest name of an existing file is taken."""
    parts = text.split(",")
    while parts:
        names = {count: ",".join(parts[:count]) for count in range(len(parts), 0, -1)}
        count = next((count for count, name in names.items() if os.path.isfile(name)), 1)
        if names[count]:
            yield Path(names[count])
        del parts[:count]
