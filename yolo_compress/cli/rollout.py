"""`yolo-compress rollout`: judge a staged rollout, and store its state in a file from call to call."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolo_compress.cli.grammar import Command
from yolo_compress.errors import DataError, RecipeError
from yolo_compress.files import strict_json
from yolo_compress.files.atomic import atomic_write
from yolo_compress.files.lock import lock
from yolo_compress.progress import result
from yolo_compress.recipe.messages import got
from yolo_compress.rollout import judge, state
from yolo_compress.rollout.schema import Document
from yolo_compress.rollout.shadow_log import read, read_truth


def handle(command: Command) -> int:
    """Judge the release of a new model, and print the verdict. Return exit code 1 if the release must be aborted."""
    document = run(command.options, command.wait)
    result(text(document))
    result(json.dumps(document))
    return 1 if document["verdict"]["status"] == "abort" else 0


def run(options: Mapping[str, str], wait: bool = True) -> Document:
    """Judge the new model B against model A, which is in use, from their logs. If a state file is given, store the state in it.

    Args:
        options: Options of the command line. `a` and `b` are needed; `truth`, `stage`, `state`, `cap` and budgets are optional.
        wait: Whether to wait for another call with the same state file.

    Returns:
        The verdict, as made by `rollout.judge.judge`.

    Raises:
        RecipeError: An option is wrong.
        DataError: A log cannot be used.
        StorageError: The state file cannot be written.
        Locked: Another call uses the state file, and `wait` is false.
    """
    allowed, cap = judge.budgets(options.get("budgets")), _cap(options.get("cap", "1"))
    log_a, log_b = read(Path(options["a"])), read(Path(options["b"]))
    truth = read_truth(Path(options["truth"])) if "truth" in options else None
    given = state.stage_of(options["stage"]) if "stage" in options else None
    if state.STAGES[given or 0] > cap:
        raise RecipeError(f"command line: stage={options['stage']} is above cap={options['cap']}")
    fresh = state.State(log_a.model, log_b.model, stage=given or 0)
    if "state" not in options:
        return judge.judge(log_a, log_b, fresh, allowed, truth, cap)[0]
    path = Path(options["state"])
    if not path.name:
        raise RecipeError(f"command line: state={path} is a folder; give the name of a file in it")
    with lock(path.with_name(path.name + ".lock"), f"rollout state={path}", wait):
        before = _load(path) or fresh
        if given not in (None, before.stage):
            at = f"{state.STAGES[before.stage]:.0%}"
            raise RecipeError(f"command line: stage={options['stage']}, but {path} is at {at}; leave stage out")
        if before.status != "aborted" and before.exposure > cap:
            raise RecipeError(f"command line: cap={options['cap']}, but {path} is at {before.exposure:.0%} already")
        document, after = judge.judge(log_a, log_b, before, allowed, truth, cap)
        atomic_write(path, json.dumps(state.state_json(after), sort_keys=True, allow_nan=False) + "\n")
    return document


def _cap(text: str) -> float:
    try:
        cap = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        cap = -1.0
    if not state.STAGES[0] <= cap <= 1:
        raise RecipeError(
            f"command line: cap: got {got(text)}, expected a share of the robots from 0.01 to 1, or 1% to 100%"
        )
    return cap


def _load(path: Path) -> state.State | None:
    if not os.path.lexists(path):
        return None
    return state.state_from(strict_json.load(path, DataError, "; remove it to begin a new release at 1 %"), str(path))


def text(document: Mapping[str, Any]) -> str:
    """Return the verdict as text: the decision and its reasons, then a table with a line for each rule."""
    verdict, a, b = document["verdict"], document["a"], document["b"]
    lines = [
        f"{verdict['status']} at {document['stage']:.0%}: {b['name']} version {b['version']} beside "
        f"{a['name']} version {a['version']}; run B on {document['exposure']:.0%} of the robots",
        *(f"  {reason}" for reason in verdict["reasons"]),
        "",
        f"{'rule':<14}{'value':>10}{'low':>10}{'high':>10}{'budget':>8}  ",
    ]
    for rule in document["rules"]:
        shown = "".join(
            f"{'-' if rule[key] is None else format(rule[key], '.4f'):>10}" for key in ("value", "low", "high")
        )
        lines.append(f"{rule['name']:<14}{shown}{rule['budget']:>8g}  {rule['says']}")
    return "\n".join(lines)
