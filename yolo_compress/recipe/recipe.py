"""Read recipes: YAML files with one section for each stage. A recipe is checked as a whole before any stage runs.

If the section of a stage is absent or null, the stage is left out. An empty section (`distill: {}`) uses the defaults. The order of
the stages comes from `pipeline`, not from the file. Nothing here imports torch, so `status` answers within a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .. import home
from ..errors import RecipeError
from ..files import strict_yaml
from .checks import contradictions
from .messages import allowed, did_you_mean, got, nearest, takes_text
from .sections import (
    BenchConfig,
    ControlConfig,
    DataConfig,
    DistillConfig,
    EngineConfig,
    ExportConfig,
    PruneConfig,
    QatConfig,
    ReportConfig,
    RunConfig,
    SearchConfig,
    Section,
    Sections,
    SourceConfig,
    SparsifyConfig,
    TrainConfig,
)

SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "run": RunConfig,
    "teacher": SourceConfig,
    "baseline": SourceConfig,
    "sparsify": SparsifyConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "qat": QatConfig,
    "export": ExportConfig,
    "engine": EngineConfig,
    "bench": BenchConfig,
    "control": ControlConfig,
    "report": ReportConfig,
    "search": SearchConfig,
}
__all__ = [
    "SECTIONS", "BenchConfig", "ControlConfig", "DataConfig", "DistillConfig", "EngineConfig", "ExportConfig", "PruneConfig",
    "QatConfig", "Recipe", "ReportConfig", "RunConfig", "SearchConfig", "SourceConfig", "SparsifyConfig", "TrainConfig", "check_key",
    "load", "names", "options",
]  # fmt: skip

ALWAYS = ("data", "run", "baseline")  # sections that cannot be left out
_COMMAND_LINE = "command line"
SHIPPED = "shipped"  # `Recipe.source` of a recipe of the package


class Recipe(Sections):
    """The settings of all stages, checked as a whole. `load` returns a recipe. It is immutable.

    Attributes:
        name, data, run, teacher, ...: See `Sections`; `options()` describes the knobs.
    """

    _source: str = PrivateAttr("")

    @property
    def source(self) -> str:
        """Path of the recipe file, "shipped", or "" if the recipe was not loaded. The operator `==` ignores this property."""
        return self._source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and dict(self) == dict(other)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for problem in contradictions(self):
            raise ValueError(problem)
        return self

    def replaced(self, sections: Mapping[str, Section | None]) -> Recipe:
        """Return a copy with some sections replaced, checked as a whole. None leaves a section out.

        Raises:
            RecipeError: The sections cannot work together.
        """
        try:
            made = Recipe.model_validate({**dict(self), **sections})
        except ValidationError as error:
            raise RecipeError(f"recipe {self.name}: {error.errors()[0]['ctx']['error']}") from None
        made._source = self._source
        return made

    def dump(self) -> str:
        """Return the effective recipe as YAML. If a file with this text has the recipe's name, `load` returns an equal recipe."""
        return strict_yaml.dump(self.model_dump(mode="json", exclude={"name"}))


def load(name_or_path: str | os.PathLike[str], overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe and apply the overrides of the command line in order. The last override of a key wins.

    Args:
        name_or_path: Name of a shipped recipe (`names()`), or a path. A path has a folder in it, or ends in .yaml or .yml.
        overrides: Pairs such as `("prune.keep_flops", "0.6")`. Values are YAML scalars or flow lists. For a knob that
            takes any text (a path, a device) the value is not parsed, so `run.device=0` is "0". `null` clears a knob
            that may be null. An override for a section that the recipe does not have adds this section with its
            defaults. `("sparsify", "null")` drops a section.

    Returns:
        The recipe, checked as a whole. Data and weights are not read yet.

    Raises:
        RecipeError: The recipe does not exist or is not strict YAML. Or it has an unknown key, a value out of range, or sections
            that cannot work together. The message has the file and line (or "command line"), the key, the value and the allowed
            values.
        StorageError: The file exists but cannot be read.
    """
    document, name, source = _read(name_or_path)
    recipe = build(document, name, overrides)
    recipe._source = source
    return recipe


def build(document: strict_yaml.Document, name: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Return the recipe of a parsed document. For the overrides and errors see `load`.

    Raises:
        RecipeError: The document, with the overrides applied, is not a valid recipe.
    """
    raw = _sections(document)
    for key, text in overrides:
        _override(raw, key, text)
    _drop_idle(raw, "prune", "kind", PruneConfig, {key: text for key, text in overrides})
    _drop_idle(raw, "distill", "teacher", DistillConfig, {key: text for key, text in overrides})
    _drop_alternatives(raw, "prune", PruneConfig.BUDGETS, {key: text for key, text in overrides})
    for source in ("baseline", "teacher"):
        _drop_alternatives(raw, source, SourceConfig.ORIGINS, {key: text for key, text in overrides})
    try:
        recipe = Recipe.model_validate({**raw, "name": name})
    except ValidationError as error:
        raise RecipeError(
            "\n".join(_error_lines(error, raw, document, {tuple(key.split(".")) for key, _ in overrides}))
        ) from None
    for key, _ in overrides:
        _refuse_idle(recipe, *key.partition(".")[::2])
    return recipe


def names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(item.name.removesuffix(".yaml") for item in _shipped().iterdir() if item.name.endswith(".yaml"))


def options() -> dict[str, FieldInfo]:
    """Return every knob by its dotted name, in the order of the recipe. The fields have type, default, limits and help."""
    return {f"{name}.{key}": field for name, kind in SECTIONS.items() for key, field in kind.model_fields.items()}


def check_key(key: str, also: Iterable[str] = ()) -> None:
    """Check the left side of `section.key=value`.

    Args:
        key: A dotted knob, or a section.
        also: Other words that the caller accepts, for "did you mean".

    Raises:
        RecipeError: The knob or section does not exist. The message suggests the most similar name.
    """
    section, dot, knob = key.partition(".")
    if section not in SECTIONS:
        raise RecipeError(f"{_COMMAND_LINE}: {_unknown_section(key, also)}")
    if dot and knob not in SECTIONS[section].model_fields:
        raise RecipeError(f"{_COMMAND_LINE}: {_unknown_knob(section, knob)}")


def _shipped() -> Any:
    return resources.files(__package__) / "shipped"


def _read(name_or_path: str | os.PathLike[str]) -> tuple[strict_yaml.Document, str, str]:
    """Find and parse a recipe file. Return the document, the recipe's name and `Recipe.source`."""
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and os.sep not in text and not text.lower().endswith((".yaml", ".yml")):
        if text not in names():
            hint = did_you_mean(text, names()) or f"; shipped are {', '.join(names())}"
            raise RecipeError(f"no recipe {got(text)}{hint} (a file name ends in .yaml)")
        content = (_shipped() / f"{text}.yaml").read_text(encoding="utf-8")
        return strict_yaml.parse(content, f"recipes/{text}.yaml"), text, SHIPPED
    document = strict_yaml.load(text)
    name = Path(text).stem
    if not home.is_recipe_name(name):
        raise RecipeError(f"{document.source}: {got(name)} cannot be the name of a folder in weights/; rename the file")
    return document, name, os.path.realpath(text)


def _sections(document: strict_yaml.Document) -> dict[str, Any]:
    """Return the sections of the file that are not null.

    Raises:
        RecipeError: A section is unknown, or is empty after its colon.
    """
    for key in document.data:
        if key not in SECTIONS:
            raise RecipeError(f"{document.where((key,))}: {_unknown_section(str(key))}")
        if (key,) in document.blank:
            choice = f"write {key}: {{}} for its defaults"
            choice += "" if key in ALWAYS else f", or {key}: null to leave the stage out"
            raise RecipeError(f"{document.where((key,))}: {key}: is empty; {choice}")
    return {key: value for key, value in document.data.items() if value is not None or key in ALWAYS}


def _override(raw: dict[str, Any], key: str, text: str) -> None:
    """Apply one override to `raw`, in place."""
    check_key(key)
    section, dot, knob = key.partition(".")
    if not dot:
        if strict_yaml.resolve(text.strip()) is not None or not text.strip():
            hint = (
                did_you_mean(section, SECTIONS[section].model_fields)
                or "; the only value of a section is null, which leaves it out"
            )
            hint = ", did you mean data.yaml?" if section == "data" else hint
            raise RecipeError(f"{_COMMAND_LINE}: {key}={strict_yaml.shown(text)}: {section} is a section{hint}")
        if section in ALWAYS:
            raise RecipeError(f"{_COMMAND_LINE}: {key}=null: the section {section} cannot be left out")
        raw.pop(section, None)
        return
    field = SECTIONS[section].model_fields[knob]
    word = None if text == "null" else text
    value = word if takes_text(field) else strict_yaml.value(text, f"{_COMMAND_LINE}: {key}")
    if not isinstance(raw.get(section, {}), dict):
        return  # the section is not a mapping: validation reports it, with its line
    raw[section] = {**raw.get(section, {}), knob: value}


def _drop_alternatives(raw: dict[str, Any], section: str, knobs: Sequence[str], overridden: Mapping[str, str]) -> None:
    """Clear settings in `raw` that the command line excludes: of `knobs`, only one may be set at a time."""
    given = {knob: overridden.get(f"{section}.{knob}") for knob in knobs}
    if isinstance(raw.get(section), dict) and any(text not in (None, "null") for text in given.values()):
        raw[section] = {**raw[section], **{knob: None for knob, text in given.items() if text is None}}


def _drop_idle(
    raw: dict[str, Any],
    section: str,
    knob: str,
    config: type[PruneConfig | DistillConfig],
    overridden: Mapping[str, str],
) -> None:
    """If the command line sets `prune.kind` or `distill.teacher`, drop the file's knobs that the new value does not use."""
    kind = overridden.get(f"{section}.{knob}", "")
    if isinstance(raw.get(section), dict) and kind in get_args(config.model_fields[knob].annotation):
        idle = {name for name in config.idle(kind) if f"{section}.{name}" not in overridden}
        raw[section] = {name: value for name, value in raw[section].items() if name not in idle}


def _refuse_idle(recipe: Recipe, section: str, knob: str) -> None:
    """Raise RecipeError if the command line sets a training knob of a model that is not trained. A file may have such knobs."""
    source = getattr(recipe, section)
    if isinstance(source, SourceConfig) and source.weights is not None and knob not in ("", "weights"):
        raise RecipeError(
            f"{_COMMAND_LINE}: {section}.{knob} has no effect: {section}.weights={strict_yaml.shown(source.weights)} "
            f"is used without training. To train from it, give {section}.pretrained instead of {section}.weights"
        )


def _error_lines(
    error: ValidationError,
    raw: dict[str, Any],
    document: strict_yaml.Document,
    overridden: set[tuple[str, ...]],
) -> Iterator[str]:
    """Yield one line for each wrong key: its place, the key, its value and the allowed values."""
    seen = set()
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"][:2])  # deeper parts are list items and members of a union
        if path in seen:
            continue
        seen.add(path)
        if not path:  # sections that cannot work together
            yield f"{document.source}: {item['ctx']['error']}"
            continue
        where = _COMMAND_LINE if path in overridden else document.where(path)
        yield f"{where}: {_problem(item, path, raw)}"


def _problem(item: Any, path: tuple[str, ...], raw: dict[str, Any]) -> str:
    """Return the message for one error of pydantic, without its place."""
    section, name = path[0], ".".join(path)
    if item["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown_knob(section, path[1])
    if name == "data.yaml" and item["type"] == "missing":
        return "data.yaml is not given: add data.yaml=my.yaml (with make: DATA=my.yaml)"
    if item["type"] == "missing":
        need = f"; expected {allowed(options()[name])}" if len(path) == 2 else ""
        return f"{name} is missing and has no default{need}"
    if len(path) == 1:
        return f"{name}: got {got(raw[section])}, expected a section (key: value)"
    value = got(raw[section].get(path[1]))
    if item["type"] == "value_error":
        return f"{name}: got {value}, {item['ctx']['error']}"
    return f"{name}: got {value}, expected {allowed(options()[name])}"


def _unknown_section(word: str, also: Iterable[str] = ()) -> str:
    """Return the message for an unknown section, with the most similar section, word of the caller, or knob."""
    section, _, knob = word.partition(".")
    owners: dict[str, list[str]] = {}
    for name in options():
        owners.setdefault(name.partition(".")[2], []).append(name)
    if knob and (near := nearest(section, SECTIONS)):
        hint = f", did you mean {near}.{knob}?"
    elif near := nearest(word, [*also, *SECTIONS, *owners]):
        hint = f", did you mean {near}?"
        if near in owners and near not in SECTIONS:
            hint += f" Write it with its section: {', '.join(owners[near])}"
    else:
        hint = "; sections are " + ", ".join(SECTIONS)
    return f"{strict_yaml.shown(word) or got(word)}: unknown key{hint}"


def _unknown_knob(section: str, knob: str) -> str:
    known = SECTIONS[section].model_fields
    hint = did_you_mean(knob, known) or f"; {section} takes {', '.join(known)}"
    return f"{section}.{strict_yaml.shown(knob)}: unknown key{hint}"
