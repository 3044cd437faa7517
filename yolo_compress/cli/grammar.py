"""The grammar of the command line: `yolo-compress VERB [recipe=NAME|FILE] [section.key=value ...] [lock=fail] ...`.

Users know `key=value` from the command `yolo`; `--key value` and `--key=value` mean the same. This module splits the command
line, by the table in `verbs`. `recipe.load` reads the values, and `cli/<verb>.py` runs the verb.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import RecipeError
from ..recipe import recipe
from ..recipe.messages import did_you_mean, got
from ..recipe.recipe import Recipe
from . import verbs
from .verbs import DEFAULT_RECIPE, VERBS, Option, Verb

_WHERE = "command line"
_FLAGS = {"-h": "help", "--help": "help", "--version": "version", "-V": "version"}


@dataclass(frozen=True)
class Command:
    """A command line, split into verb, recipe, overrides, options and words.

    Attributes:
        verb: A key of `VERBS`, such as "prune".
        recipe: Name or file of the recipe.
        overrides: `(section.key, value)` for each setting of the recipe, in the order of the command line. Values are text.
        options: The options on the command line by name: `lock`, `force`, `target`, ...
        words: Words without `=` after the verb: the names after `fetch`, the file after `lint`, the verb after `help`.
    """

    verb: str
    recipe: str = DEFAULT_RECIPE
    overrides: tuple[tuple[str, str], ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    @property
    def wait(self) -> bool:
        """Whether to wait for another run that uses the store."""
        return self.options.get("lock", "wait") == "wait"

    @property
    def dry_run(self) -> bool:
        """Whether to print what would be done, and to do nothing."""
        return self.options.get("dry_run") == "true"

    @property
    def force(self) -> bool:
        """Whether to run the stage again although it is up to date."""
        return self.options.get("force") == "true"

    @property
    def names_recipe(self) -> bool:
        """Whether the command line names a recipe or changes a setting of it."""
        return bool(self.overrides) or self.recipe != DEFAULT_RECIPE

    def load(self) -> Recipe:
        """Return the recipe of the command line with its overrides applied.

        Raises:
            RecipeError: The recipe or a value is not valid.
        """
        return recipe.load(self.recipe, self.overrides)


def parse(argv: Sequence[str]) -> Command:
    """Split a command line into verb, options, overrides and words.

    Args:
        argv: Words after the program's name. If the list is empty or contains `--help`, the verb is `help`.

    Raises:
        RecipeError: A verb, option or knob is unknown or given twice, or a word is out of place. The message suggests the nearest
            known word.
    """
    if not argv:
        return Command("help")
    if argv[0] in _FLAGS:
        argv = (_FLAGS[argv[0]], *argv[1:])
    if odd := [word for word in argv if "\0" in word]:
        raise RecipeError(f"{_WHERE}: {got(odd[0])} holds a NUL character, which no name and no value has")
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        raise RecipeError(unknown_verb(name))
    if "--help" in rest or "-h" in rest:
        return Command("help", options={"all": "true"} if "--all" in rest else {}, words=(name,))
    verb, overrides, options, words = VERBS[name], list[tuple[str, str]](), dict[str, str](), list[str]()
    everywhere = verbs.options()
    for key, value in _pairs(verb, rest, everywhere):
        if not key:
            words.append(value)
        elif verb.option(key) or (
            key in everywhere and key.partition(".")[0] not in recipe.SECTIONS
        ):  # `engine` is an option and a section
            _check_option(verb, key, value, options)
            options[key] = value
        elif not verb.knobs:
            raise RecipeError(f"{_WHERE}: {name} takes no {got(key)}; {verb.usage}")
        else:
            recipe.check_key(key, _names(verb))
            if earlier := [given for knob, given in overrides if knob == key]:
                raise RecipeError(f"{_WHERE}: {key} is given twice: {got(earlier[0])} and {got(value)}; give it once")
            overrides.append((key, value))
    _check_whole(verb, words, options)
    return Command(name, options.pop("recipe", DEFAULT_RECIPE), tuple(overrides), options, tuple(words))


def _pairs(verb: Verb, words: Sequence[str], everywhere: Mapping[str, Option]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every argument. The key of a word without `=` is empty."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        option = everywhere.get(key)
        if equals:
            yield key, value
        elif not word.startswith("--"):
            yield "", word
        elif option and option.switch and (not rest or rest[0] not in option.choices):
            yield key, "true"
        elif not rest or rest[0].startswith("--"):
            if option is None and verb.knobs:
                recipe.check_key(key, _names(verb))
            raise RecipeError(f"{_WHERE}: {word} needs a value: {word} VALUE, or {key}=VALUE")
        else:
            yield key, rest.pop(0)


def _names(verb: Verb) -> list[str]:
    return [option.name for option in verb.options]


def _check_option(verb: Verb, key: str, value: str, given: Mapping[str, str]) -> None:
    option = verb.option(key)
    if option is None:
        if verb.knobs and any(knob.endswith(f".{key}") for knob in recipe.options()):
            recipe.check_key(key, _names(verb))  # names the sections that have it
        owners = [one.name for one in VERBS.values() if one.option(key)]
        belongs = f", an option of {owners[0]}" if len(owners) == 1 else ""
        raise RecipeError(f"{_WHERE}: {verb.name} takes no {key}{belongs}; {verb.usage}")
    if key in given:
        raise RecipeError(f"{_WHERE}: {key} is given twice: {got(given[key])} and {got(value)}")
    if not value:
        raise RecipeError(f"{_WHERE}: {key} is empty; give {key}={option.form or 'true'}, or leave it out")
    if option.choices and value not in option.choices:
        raise RecipeError(f"{_WHERE}: {key}: got {got(value)}, expected {' or '.join(option.choices)}")


def _check_whole(verb: Verb, words: Sequence[str], options: Mapping[str, str]) -> None:
    """Check the command line as a whole: no required option or word is missing, and there are not too many words."""
    if absent := [option.name for option in verb.options if option.needed and option.name not in options]:
        raise RecipeError(f"{_WHERE}: {verb.name} needs {' and '.join(absent)}; {verb.usage}")
    for option in verb.options:
        if option.requires and option.name in options and option.requires not in options:
            raise RecipeError(f"{_WHERE}: {option.name} needs {option.requires}; give both or neither; {verb.usage}")
    if verb.words is not None:
        most = len(words) if verb.words.most is None else verb.words.most
        if not verb.words.least <= len(words) <= most:
            raise RecipeError(f"{_WHERE}: {verb.name} takes {verb.words.count}, got {len(words)}; {verb.usage}")
    elif words:
        if words[0] in VERBS:
            raise RecipeError(
                f"{_WHERE}: expected one verb, got {verb.name} and {words[0]}; a stage also runs the stages it needs"
            )
        raise RecipeError(f"{_WHERE}: {got(words[0])} is out of place; expected key=value or --key value")


def unknown_verb(word: str, also: Iterable[str] = ()) -> str:
    """Return the error message for a word that is not a verb, with the most similar verb.

    Args:
        word: Word of the command line in the place of a verb.
        also: Other words that are allowed in this place.
    """
    if "=" in word or word.startswith("--"):
        return f"{_WHERE}: the verb comes first, got {got(word)}; verbs are {', '.join(VERBS)}"
    hint = did_you_mean(word, [*VERBS, *also]) or "; verbs are " + ", ".join(VERBS)
    return f"{_WHERE}: unknown verb {got(word)}{hint}"
