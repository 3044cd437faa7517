"""The result of a study as one document, and its table. The report's files are made from it (`page.py`)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from typing_extensions import TypedDict

from yolo_compress.report import numbers as n
from yolo_compress.report.tables.grid import Column, Field, Line, Table, cells, columns, field
from yolo_compress.search.front import Engine, choose, front
from yolo_compress.search.space import Point, point_text
from yolo_compress.search.study import Study, Trial

SCHEMA = 1


class GoalFacts(TypedDict):
    cost: Literal["latency", "size"]
    unit: str  # "ms" or "MiB"
    runtime: str
    limit: float | None  # largest cost; null: no limit
    max_drop: float  # fraction of the baseline's mAP50-95


class EngineRow(Engine):
    """An engine with its place in the study."""

    front: bool  # whether it is on the front
    chosen: bool
    point: Point  # values of the trial; empty for the baseline


class TrialRow(TypedDict):
    trial: int
    state: Literal["done", "stopped", "failed", "open"]
    after: str  # last level that finished
    why: str | None  # why it stopped or failed
    retention: float | None  # at that level
    cost: float | None
    seconds: float | None
    point: Point


class SearchDocument(TypedDict):
    """The result of a study, schema 1. Missing figures are null."""

    schema: int
    study: str
    verdict: Literal["dense", "reached", "unproven", "missed"]
    line: str  # the verdict as a sentence
    goal: GoalFacts
    space: dict[str, str]  # knob of `search` -> its values, as text
    engines: list[EngineRow]  # cheapest first
    trials: list[TrialRow]
    counts: dict[str, int]  # state -> number of trials
    planned: int  # trials of the recipe
    processor: str | None  # processor or GPU that engines were timed on; null if the search lowers the size
    spent_s: float  # time of all workers
    command: str | None  # makes the chosen model; null: nothing was measured
    not_tested: list[str]


def document(study: Study) -> SearchDocument:
    """Return the result of a study as it is now."""
    trials = study.trials()
    engines = study.engines(trials)
    choice, on_front = choose(engines, study.goal), front(engines)
    points = {one.number: one.point for one in trials}
    rows: list[EngineRow] = [
        {
            **one,
            "front": one in on_front,
            "chosen": one is choice.engine,
            "point": points[one["trial"]] if one["trial"] is not None else {},
        }
        for one in sorted(engines, key=lambda one: one["cost"])
    ]
    goal, search = study.goal, study.base.search
    assert search is not None
    listed = [_row(one) for one in trials]
    return {
        "schema": SCHEMA,
        "study": study.name,
        "verdict": choice.verdict,
        "line": choice.line,
        "goal": {
            "cost": goal.cost,
            "unit": goal.unit,
            "runtime": goal.runtime,
            "limit": goal.limit,
            "max_drop": goal.max_drop,
        },
        "space": {knob: axis.text() for knob, axis in study.space.items()},
        "engines": rows,
        "trials": listed,
        "counts": {
            state: sum(one["state"] == state for one in listed) for state in ("done", "stopped", "failed", "open")
        },
        "planned": search.trials,
        "processor": study.processor,
        "spent_s": round(study.spent_s(), 1),
        "command": f"yolo-compress run recipe={shlex.quote(str(chosen_file(study)))}" if choice.engine else None,
        "not_tested": _not_tested(rows, goal.cost),
    }


def chosen_file(study: Study) -> Path:
    """Return the path of the chosen engine's recipe. Its name is also that of the links in `weights/`, so it has the study's name."""
    return study.folder / f"{study.name}-chosen.yaml"


def engines_table(found: SearchDocument) -> Table:
    """Return the table of the front, with the baseline and the chosen engine."""
    unit = found["goal"]["unit"]
    fields: tuple[Field, ...] = (
        Field(Column("Engine", right=False), _name),
        field("p50 ms" if unit == "ms" else "MiB", "cost", n.three_digits),
        field("Retention", "retention", n.percent),
        Field(Column("95 % interval"), lambda row: n.interval(row["low"], row["high"], n.percent)),
        field("mAP50-95", "map50_95", n.fixed, rank=2),
        field("MiB", "size_mib", n.three_digits, rank=3),
        Field(Column("Knobs", right=False, rank=4), _knobs),
    )
    if unit == "MiB":
        fields = (*fields[:5], fields[6])
    shown = [row for row in found["engines"] if row["front"] or row["chosen"] or row["trial"] is None]
    lines = [
        Line(cells(fields, row), mark="passed" if row["chosen"] else "reference" if row["trial"] is None else "")
        for row in shown
    ]
    notes = [
        "Each engine of the front is cheaper than all that keep more mAP. Retention is mAP50-95 divided by the baseline's in FP32."
    ]
    if found["processor"]:
        notes.append(f"Latencies are those of {found['processor']}.")
    return Table("Front", columns(fields), tuple(lines), tuple(notes))


def trials_table(found: SearchDocument) -> Table:
    """Return the table of all trials."""
    fields = (
        Field(Column("Trial", right=False), lambda row: str(row["trial"])),
        Field(Column("State", right=False), _state),
        field("p50 ms" if found["goal"]["unit"] == "ms" else "MiB", "cost", n.three_digits),
        field("Retention", "retention", n.percent),
        field("Time", "seconds", n.duration),
        Field(Column("Knobs", right=False), _knobs),
    )
    lines = [Line(cells(fields, row), mark="failed" if row["state"] == "failed" else "") for row in found["trials"]]
    return Table("Trials", columns(fields), tuple(lines))


def _row(trial: Trial) -> TrialRow:
    outcome = trial.outcome
    engine = max(outcome["engines"], key=lambda one: one["retention"], default=None) if outcome else None
    last = list(trial.figures.values())[-1] if trial.figures else None
    return {
        "trial": trial.number,
        "state": outcome["state"] if outcome else "open",
        "after": outcome["after"] if outcome else list(trial.figures)[-1] if trial.figures else "",
        "why": outcome["why"] if outcome else None,
        "retention": engine["retention"] if engine else last["retention"] if last else None,
        "cost": engine["cost"] if engine else last["cost"] if last else None,
        "seconds": outcome["seconds"] if outcome else None,
        "point": trial.point,
    }


def _name(row: Mapping[str, object]) -> str:
    who = "baseline" if row["trial"] is None else f"trial {row['trial']}"
    return f"{who} {row['placement']}" + (" (chosen)" if row["chosen"] else "")


def _state(row: Mapping[str, object]) -> str:
    after = f" after {row['after']}" if row["state"] != "done" and row["after"] else ""
    return f"{row['state']}{after}"


def _knobs(row: Mapping[str, object]) -> str:
    return point_text(cast(Point, row["point"]))


def _not_tested(rows: list[EngineRow], cost: str) -> list[str]:
    trials = len({row["trial"] for row in rows})
    sentences = [
        f"The engine was chosen among those of {trials} models by the same validation images that its retention is measured on, so the "
        "retention is too high on average. Judge it on images that the search has not seen, with `yolo-compress ab`.",
        "Each model was trained once, with one seed. The intervals cover the choice of the images, not of the seed.",
    ]
    if any(row["low"] is None for row in rows):
        sentences.append("Too few validation images have objects for an interval.")
    if cost == "latency" and (disturbed := sum(not row["quiet"] for row in rows)):
        sentences.append(f"Other programs used the processors while {disturbed} of {len(rows)} engines were timed.")
    return sentences
