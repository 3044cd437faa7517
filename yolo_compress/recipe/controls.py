"""Which controls a recipe can have, and which trainings they repeat. See `stages.control`."""

from __future__ import annotations

from .knob_types import ControlNet, number
from .sections import Sections

REPEATED = ("sparsify", "prune", "distill")  # stages whose training the controls repeat, in order
PRUNED_STEP = 0.65  # training step of a model with half of the MACs, relative to a step of the baseline


def trainings(recipe: Sections, net: ControlNet | None = None) -> list[str]:
    """Return the stages of `REPEATED` that train in this recipe; with `net`, those in which this control trains.

    The control `longer` has no teacher, so it cannot train where there are no labels.
    """
    trained = [stage for stage in REPEATED if (section := getattr(recipe, stage)) and section.epochs]
    if net == "longer" and recipe.distill and not recipe.distill.labelled:
        trained = [stage for stage in trained if stage != "distill"]
    return trained


def epochs(recipe: Sections, net: ControlNet | None = None) -> int:
    """Return the epochs of all `trainings`. Call it after `auto_values.resolve`, which replaces every `auto`."""
    return sum(number(getattr(recipe, stage).epochs) for stage in trainings(recipe, net))


def has_teacher(recipe: Sections) -> bool:
    """Return whether a teacher trains the compressed model of this recipe, before QAT."""
    trained = trainings(recipe)
    return "distill" in trained or bool(recipe.prune and "prune" in trained and recipe.prune.teach_from_parent)


def cuts(recipe: Sections) -> bool:
    """Return whether the recipe makes the model smaller, by fewer channels or by factors."""
    return recipe.prune is not None and recipe.prune.kind in ("channel", "low_rank")


def possible(recipe: Sections) -> tuple[ControlNet, ...]:
    """Return the controls that differ from each other and from the baseline in this recipe."""
    trained = trainings(recipe)
    nets: list[ControlNet] = ["longer"] if trainings(recipe, "longer") else []
    if has_teacher(recipe) and (recipe.prune or recipe.sparsify):  # else the compressed model itself is this control
        nets.append("taught")
    if trained and cuts(recipe):
        nets.append("narrowed")
    return tuple(nets)


def chosen(recipe: Sections) -> tuple[ControlNet, ...]:
    """Return the controls that the recipe trains. Without a section `control` there are none."""
    if recipe.control is None:
        return ()
    able = possible(recipe)
    return able if recipe.control.nets == "auto" else tuple(net for net in able if net in recipe.control.nets)
