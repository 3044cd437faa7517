"""`yolo-compress help`. The text is made from the table in `verbs` and the settings of the recipe, so no value is written twice."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from ..errors import RecipeError
from ..progress import result
from ..recipe import recipe
from ..recipe.knob_types import GROUPS, words
from ..recipe.messages import allowed, typed
from .grammar import Command, unknown_verb
from .verbs import DEFAULT_RECIPE, HEADINGS, VERBS, Option, Verb

NARROWEST, WIDEST = 60, 100  # columns
ADVANCED = GROUPS[-1]
INDENT = " " * 6  # of the sentences below an entry
TIED = "\u00a0"  # a space at which no line is broken
ANY_KNOB = Option(
    "section.key",
    "",
    "Override a knob. `yolo-compress help --all` lists them.",
    "the recipe's",
    "any knob of the recipe",
)
START = """\
Start with your own data (init writes my-recipe.yaml):
  yolo-compress init data.yaml=my.yaml weights=yolov8s.pt
  yolo-compress run recipe=my-recipe.yaml"""
MORE = """\
yolo-compress help VERB       knobs and options of a verb, as in help prune
yolo-compress help SECTION    knobs of a section of the recipe, as in help data
yolo-compress help --all      all knobs of all sections"""


def handle(command: Command) -> int:
    """Print the help of the program, or of the verb or section that the command line names."""
    name = command.words[0] if command.words else None
    if name is not None and name not in VERBS and name not in recipe.SECTIONS:
        raise RecipeError(unknown_verb(name, recipe.SECTIONS))
    result(help_text(name, command.options.get("all") == "true"))
    return 0


def help_text(name: str | None = None, everything: bool = False, width: int | None = None) -> str:
    """Return the help of a verb or section, or of the program.

    Args:
        name: Key of `VERBS` or of `recipe.SECTIONS`. None: the program.
        everything: Include advanced knobs. For the program, include the knobs of all sections.
        width: Number of columns. None: the width of the terminal, or 80 if there is no terminal.
    """
    columns = min(max(width or shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)
    if name:
        blocks = _of_name(name, everything, columns)
    elif everything:
        blocks = (block for section in recipe.SECTIONS for block in _of_section(section, True, columns))
    else:
        blocks = _of_program(columns)
    return "\n\n".join(blocks)


def _of_program(width: int) -> Iterator[str]:
    yield _wrapped(f"usage: yolo-compress VERB {VERBS['run'].form}", width, "  ")
    yield START
    column = max(map(len, VERBS)) + 4
    for heading in HEADINGS:
        rows = [f"  {verb:<{column - 2}}{row.help}" for verb, row in VERBS.items() if row.heading == heading]
        yield "\n".join([heading, *(_wrapped(row, width, " " * column) for row in rows)])
    shipped = f"Recipes: {', '.join(recipe.names())}, or a .yaml file; {DEFAULT_RECIPE} where none is given."
    yield _wrapped(shipped, width, "  ")
    yield MORE


def _of_name(name: str, everything: bool, width: int) -> Iterator[str]:
    verb = VERBS.get(name)
    if verb:
        yield _wrapped(f"yolo-compress {name}: {verb.help}", width)
        yield _wrapped(verb.usage, width, "  ")
    if name in recipe.SECTIONS:
        yield from _of_section(name, everything, width)
    if verb:
        yield from _options(verb, width)
    hidden = sum(words(recipe.options()[key]).group == ADVANCED for key in _knobs(name))
    if hidden and not everything:
        yield f"{hidden} advanced knob{'s' * (hidden > 1)}: yolo-compress help {name} --all"


def _of_section(name: str, everything: bool, width: int) -> Iterator[str]:
    """Yield a line about the section, then a block for each group of its knobs."""
    yield _wrapped(f"Section `{name}` of the recipe. {' '.join((recipe.SECTIONS[name].__doc__ or '').split())}", width)
    keys = _knobs(name)
    column = max(map(len, keys)) + 4
    for group in GROUPS:
        rows = [key for key in keys if words(recipe.options()[key]).group == group]
        if rows and (everything or group != ADVANCED):
            yield "\n".join([group, *(_knob(key, column, width) for key in rows)])


def _knobs(section: str) -> list[str]:
    return [key for key in recipe.options() if key.startswith(f"{section}.")]


def _knob(key: str, column: int, width: int) -> str:
    field = recipe.options()[key]
    about = words(field)
    default = "required" if field.is_required() else f"default {typed(field.default)}"
    return _entry(key, [default, allowed(field)], about.unit, [about.text, about.when], column, width)


def _options(verb: Verb, width: int) -> Iterator[str]:
    """Yield a block of help with one entry per option of the verb.

    All words without `=` share one entry. All settings of the recipe share another entry.
    """
    rows = [*([verb.words.option] if verb.words else []), *([ANY_KNOB] if verb.knobs else []), *verb.options]
    column = max((len(row.name) for row in rows), default=0) + 4
    entries = []
    for row in rows:
        default = "required" if row.needed else f"default {row.default}"
        values = " or ".join(row.choices) or row.values
        entries.append(_entry(row.name, [default, values], row.unit, [row.text], column, width))
    if entries:
        yield "\n".join(["Options", *entries])


def _entry(name: str, facts: list[str], unit: str, sentences: list[str], column: int, width: int) -> str:
    """Return one entry of the help: `name` with `facts` wrapped beside it, and each sentence below on its own lines."""
    about = "; ".join([*facts, f"unit:{TIED}{unit}"] if unit else facts)
    head = _wrapped(f"  {name:<{column - 2}}{about}", width, " " * column).replace(TIED, " ")
    return "\n".join([head, *(_wrapped(INDENT + text, width, INDENT) for text in sentences)])


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)
