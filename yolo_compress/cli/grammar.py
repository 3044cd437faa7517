"""The grammar of the command line: `yolo-compress VERB [recipe=NAME|FILE] [section.key=value ...] [lock=fail] ...`.

`key=value` is the form that users know from `yolo`; `--key value` and `--key=value` mean the same. Only words are taken
apart here: values are read by `recipe.load`, and the verbs are carried out elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import RecipeError
from ..recipe import recipe
from ..recipe.messages import did_you_mean, got
from .verbs import DEFAULT_RECIPE, OPTIONS, VERBS, usage

_WHERE = "command line"
_FLAGS = {"-h": "help", "--help": "help", "--version": "version", "-V": "version"}


@dataclass(frozen=True)
class Command:
    """A command line taken apart.

    Attributes:
        verb: a key of `VERBS`.
        recipe: name or file of the recipe.
        overrides: `(section.key, value)` in the order given, checked to be knobs of the recipe; values are still text.
        options: `lock`, `force`, `target`, ..., where given.
        words: the names after `fetch`, the file after `lint`, the verb after `help`.
    """

    verb: str
    recipe: str = DEFAULT_RECIPE
    overrides: tuple[tuple[str, str], ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    @property
    def wait(self) -> bool:
        """Whether to wait for another run that holds the store."""
        return self.options.get("lock", "wait") == "wait"

    @property
    def dry_run(self) -> bool:
        """Whether to show the plan alone."""
        return self.options.get("dry_run") == "true"

    @property
    def force(self) -> bool:
        """Whether to do again what is up to date."""
        return self.options.get("force") == "true"


def parse(argv: Sequence[str]) -> Command:
    """Takes a command line apart.

    Args:
        argv: the words after the program's name. None at all asks for help, and so does `--help` anywhere.

    Raises:
        RecipeError: unknown verb, option or knob (says which was probably meant), a word out of place, an option or a
                knob twice.
    """
    if not argv:
        return Command("help")
    if argv[0] in _FLAGS:
        argv = (_FLAGS[argv[0]], *argv[1:])
    if odd := [word for word in argv if "\0" in word]:
        raise RecipeError(f"{_WHERE}: {got(odd[0])} holds a NUL character, which no name and no value has")
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        raise RecipeError(_unknown_verb(name))
    if "--help" in rest or "-h" in rest:
        return Command("help", options={"all": "true"} if "--all" in rest else {}, words=(name,))
    verb, overrides, options, words = VERBS[name], list[tuple[str, str]](), dict[str, str](), list[str]()
    for key, value in _pairs(name, rest):
        if not key:
            words.append(value)
        elif verb.option(key) or (key in OPTIONS and key.partition(".")[0] not in recipe.SECTIONS):  # `engine` is both
            _check_option(name, key, value, options)
            options[key] = value
        elif not verb.knobs:
            raise RecipeError(f"{_WHERE}: {name} takes no {got(key)}; {usage(name)}")
        else:
            recipe.check_key(key, _names(name))
            if earlier := [given for knob, given in overrides if knob == key]:
                raise RecipeError(f"{_WHERE}: {key} is given twice: {got(earlier[0])} and {got(value)}; give it once")
            overrides.append((key, value))
    _check_words(name, words, options)
    return Command(name, options.pop("recipe", DEFAULT_RECIPE), tuple(overrides), options, tuple(words))


def _pairs(name: str, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (key, value) of every argument, with an empty key for a bare word."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if equals:
            yield key, value
        elif not word.startswith("--"):
            yield "", word
        elif key in OPTIONS and OPTIONS[key].switch and (not rest or rest[0] not in OPTIONS[key].choices):
            yield key, "true"
        elif not rest or rest[0].startswith("--"):
            if key not in OPTIONS and VERBS[name].knobs:
                recipe.check_key(key, _names(name))
            raise RecipeError(f"{_WHERE}: {word} needs a value: {word} VALUE, or {key}=VALUE")
        else:
            yield key, rest.pop(0)


def _names(verb: str) -> list[str]:
    return [option.name for option in VERBS[verb].options]


def _check_option(name: str, key: str, value: str, given: dict[str, str]) -> None:
    option = VERBS[name].option(key)
    if option is None:
        if VERBS[name].knobs and any(knob.endswith(f".{key}") for knob in recipe.options()):
            recipe.check_key(key, _names(name))  # names the sections that have it
        raise RecipeError(f"{_WHERE}: {name} takes no {key}; {usage(name)}")
    if key in given:
        raise RecipeError(f"{_WHERE}: {key} is given twice: {got(given[key])} and {got(value)}")
    if not value:
        raise RecipeError(f"{_WHERE}: {key} is empty; give {key}={option.form or 'true'}, or leave it out")
    if option.choices and value not in option.choices:
        raise RecipeError(f"{_WHERE}: {key}: got {got(value)}, expected {' or '.join(option.choices)}")


def _check_words(name: str, words: list[str], options: dict[str, str]) -> None:
    if absent := [option for option in VERBS[name].needed if option not in options]:
        raise RecipeError(f"{_WHERE}: {name} needs {' and '.join(absent)}; {usage(name)}")
    if name == "report" and "out" in options and "add" not in options:
        raise RecipeError(f"{_WHERE}: out is the folder of the report that add writes; give add too; {usage(name)}")
    if name == "fetch" and not words:
        raise RecipeError(f"{_WHERE}: fetch needs a name; {usage(name)}")
    if name == "lint" and len(words) != 1:
        raise RecipeError(f"{_WHERE}: lint takes one file, got {len(words)}; {usage(name)}")
    if name == "help" and words and words[0] not in (*VERBS, *recipe.SECTIONS):
        raise RecipeError(_unknown_verb(words[0], recipe.SECTIONS))
    if name == "help" and len(words) > 1:
        raise RecipeError(f"{_WHERE}: {usage(name)}")
    if words and not VERBS[name].words:
        word = words[0]
        if word in VERBS:
            raise RecipeError(
                f"{_WHERE}: expected one verb, got {name} and {word}; a stage also runs the stages it needs"
            )
        raise RecipeError(f"{_WHERE}: {got(word)} is out of place; expected key=value or --key value")


def _unknown_verb(word: str, also: Iterable[str] = ()) -> str:
    if "=" in word or word.startswith("--"):
        return f"{_WHERE}: the verb comes first, got {got(word)}; verbs are {', '.join(VERBS)}"
    hint = did_you_mean(word, [*VERBS, *also]) or "; verbs are " + ", ".join(VERBS)
    return f"{_WHERE}: unknown verb {got(word)}{hint}"
