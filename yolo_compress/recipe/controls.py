"""Which controls a recipe can have, and which trainings they repeat. See `stages.control`."""

from __future__ import annotations

from .knob_types import ControlNet
from .sections import Sections

REPEATED = ("sparsify", "prune", "distill")  # stages whose training the controls repeat, in order
PRUNED_STEP = 0.65  # training step of a model with half of the MACs, relative to a step of the baseline


def trainings(recipe: Sections) -> list[str]:
    """Return the stages of `REPEATED` that train in this recipe."""
    return [stage for stage in REPEATED if (section := getattr(recipe, stage)) and section.epochs]


def has_teacher(recipe: Sections) -> bool:
    """Return whether a teacher trains the compressed model of this recipe, before QAT."""
    trained = trainings(recipe)
    return "distill" in trained or bool(recipe.prune and "prune" in trained and recipe.prune.teach_from_parent)


def possible(recipe: Sections) -> tuple[ControlNet, ...]:
    """Return the controls that differ from each other and from the baseline in this recipe."""
    trained = trainings(recipe)
    nets: list[ControlNet] = []
    if (
        "sparsify" in trained
        or "prune" in trained
        or (recipe.distill and "distill" in trained and recipe.distill.labelled)
    ):
        nets.append("longer")
    if has_teacher(recipe) and (recipe.prune or recipe.sparsify):  # else the compressed model itself is this control
        nets.append("taught")
    if trained and recipe.prune and recipe.prune.kind == "channel":
        nets.append("narrowed")
    return tuple(nets)


def chosen(recipe: Sections) -> tuple[ControlNet, ...]:
    """Return the controls that the recipe trains. Without a section `control` there are none."""
    if recipe.control is None:
        return ()
    able = possible(recipe)
    return able if recipe.control.nets == "auto" else tuple(net for net in able if net in recipe.control.nets)
