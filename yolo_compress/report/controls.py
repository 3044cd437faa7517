"""Compare the compressed model with the controls, which were trained like it but lack parts of the chain (`stages.control`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from yolo_compress.recipe.controls import cuts, has_teacher
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.report.numbers import finite
from yolo_compress.report.schema import Control, ControlStep, Gate, Row

CONTROLS = {  # control -> its description in the report
    "longer": "the baseline, trained for the same epochs",
    "taught": "the baseline, trained for the same epochs with the same teacher",
    "narrowed": "a narrower model, trained for the same epochs with the same teacher",
}


def added(recipe: Recipe) -> dict[str, list[str]]:
    """Return, for each model from the baseline to the compressed one, the parts of the chain that the model before it lacks."""
    channels = cuts(recipe)
    choice = "the choice of channels" + (" and bottlenecks" if recipe.prune and recipe.prune.depth else "")
    if recipe.prune and recipe.prune.factorises:
        choice = "low rank in place of fewer channels" if recipe.prune.kind == "low_rank" else f"{choice}, and low rank"
    pruned = [choice] if channels else ["zero weights"] if recipe.prune else []
    return {
        "baseline": [],
        "longer": ["longer training"],
        "taught": ["the teacher"] if has_teacher(recipe) else [],
        "narrowed": ["fewer channels in every layer"] if channels else [],
        "compressed": [*pruned, *(["sparse training"] if recipe.sparsify else [])],
    }


def steps(parts: Mapping[str, Sequence[str]], models: Mapping[str, Mapping[str, object]]) -> list[ControlStep]:
    """Return the steps from the baseline to the compressed model. If a model is absent, its parts belong to the next model's step.

    Args:
        parts: Result of `added`.
        models: Name of each model, as in `parts` -> the keys of its `ControlStep` except `name`, `adds` and `change`.
    """
    found: list[ControlStep] = []
    adds: list[str] = []
    for name, new in parts.items():
        adds += new
        if name not in models:
            continue
        step = cast(ControlStep, {"name": name, **models[name], "adds": adds, "change": None})
        if found:
            before, now = finite(found[-1]["map50_95"]), finite(step["map50_95"])
            step["change"] = None if before is None or now is None else now - before
        found.append(step)
        adds = []
    return found


def judged_control(control: Control | None, rows: Sequence[Row], gate: Gate) -> Control | None:
    """Return the comparison with `best` and `retention` for the worst row of the gate."""
    if control is None:
        return None
    known = {
        step["name"]: value
        for step in control["steps"]
        if step["name"] in CONTROLS and (value := finite(step["map50_95"])) is not None
    }
    best = max(known, key=known.__getitem__, default=None)
    worst = next((finite(row["map50_95"]) for row in rows if row["id"] == gate["worst"] and "map50_95" in row), None)
    retention = None if best is None or worst is None or known[best] <= 0 else worst / known[best]
    return {**control, "best": best, "retention": retention}
