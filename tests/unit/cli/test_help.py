"""The help: every knob and option stands there once, with its true default, values and unit, readable at 80 columns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from pydantic import BaseModel, Field, ValidationError

from yolo_compress.cli.helptext import help_text
from yolo_compress.cli.verbs import DEFAULT_RECIPE, HEADINGS, VERBS
from yolo_compress.errors import CompressError, RecipeError
from yolo_compress.files import strict_yaml
from yolo_compress.recipe import recipe
from yolo_compress.recipe.knob_types import GROUPS, knob, words
from yolo_compress.recipe.messages import allowed, takes_text, typed

KNOBS = recipe.options()
# Numbers without a unit: a rate, a seed, a version.
BARE = {"lr0", "seed", "opset"}
NAMES = [*VERBS, *(name for name in recipe.SECTIONS if name not in VERBS)]


class Entry(NamedTuple):
    """Entry of a knob or option in the help."""

    facts: str  # default, values, unit
    text: str

    @property
    def default(self) -> str:
        return self.facts.split("; ")[0].removeprefix("default ")

    @property
    def values(self) -> str:
        return re.sub("; unit: [^;]*$", "", self.facts.partition("; ")[2])


def entries(text: str) -> dict[str, Entry]:
    """Reads a help text back: a name at column 2, its facts beside and below it, its sentences at column 6."""
    found: dict[str, Entry] = {}
    name = ""
    for line in text.split("\n"):
        depth = len(line) - len(line.lstrip())
        if depth == 2 and (parts := re.match(r"  (\S+(?: \.\.\.)?)  +(\S.*)", line)):
            name = parts[1]
            assert name not in found, f"{name} stands there twice"
            found[name] = Entry(parts[2], "")
        elif depth == 6 and name:
            found[name] = Entry(found[name].facts, f"{found[name].text} {line.strip()}".strip())
        elif depth > 6 and name:
            found[name] = Entry(f"{found[name].facts} {line.strip()}", found[name].text)
    return found


SHOWN = entries(help_text(everything=True, width=80))


def validated(name: str, text: str) -> Any:
    """The value that the command line's word gives, by the section alone; ValidationError where it is none."""
    section, _, key = name.partition(".")
    value = strict_yaml.value(text, name) if not takes_text(KNOBS[name]) or text == "null" else text
    other = {"yaml": "d.yaml"} if section == "data" else {}
    return getattr(recipe.SECTIONS[section].model_validate({**other, key: value}), key)


def test_all_shows_every_knob_once() -> None:
    assert list(KNOBS) == [name for name in KNOBS if name in SHOWN] and set(SHOWN) == set(KNOBS)


@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_says_what_it_does_and_when_to_change_it(name: str) -> None:
    about = words(KNOBS[name])
    assert about.group in GROUPS
    assert about.text.endswith(".") and about.when.endswith(".") and about.when[0].isupper()
    assert 10 < len(about.when) <= 100 and len(about.text) > 10
    assert SHOWN[name].text == f"{about.text} {about.when}"
    counts = "number" in allowed(KNOBS[name]) or name == "data.imgsz" or re.search(r"one of \d", allowed(KNOBS[name]))
    assert bool(about.unit) == (bool(counts) and name.partition(".")[2] not in BARE), (
        "a number has a unit, a word has none"
    )
    assert SHOWN[name].facts.endswith(f"; unit: {about.unit}") == bool(about.unit)


@pytest.mark.parametrize("name", [name for name in KNOBS if name != "data.yaml"])
def test_the_default_shown_is_the_default_and_can_be_typed(name: str) -> None:
    shown, true = SHOWN[name].default, KNOBS[name].default
    value = validated(name, shown)
    assert value == true and type(value) is type(true), f"{name}={shown}"


def test_the_one_knob_without_default_is_required() -> None:
    assert [name for name, shown in SHOWN.items() if shown.default == "required"] == ["data.yaml"]


@pytest.mark.parametrize("name", KNOBS)
def test_the_values_shown_are_those_it_takes(name: str) -> None:
    """Limits: on an inclusive one and just inside, yes; beyond, or on an exclusive one, an error that repeats them."""
    values = SHOWN[name].values
    inside, outside = examples(values)
    assert inside and outside, values
    for text in inside:
        validated(name, text)
    for text in outside:
        with pytest.raises(ValidationError):
            validated(name, text)
        with pytest.raises(RecipeError) as caught:
            recipe.load("digits", [(name, text)])
        message = str(caught.value)
        assert message.startswith(f"command line: {name}: got ")
        assert f"expected {values}" in message or name == "data.imgsz", message


def examples(values: str) -> tuple[list[str], list[str]]:
    """Values that a phrase of the help allows, and some that it does not."""
    inside, outside = [], []
    bounds = {sign: float(number) for sign, number in re.findall(r"([<>]=?) ([\d.]+)", values)}
    whole = "whole number" in values
    step = 1 if whole else 1e-6
    for sign, bound in bounds.items():
        beyond = bound - step if ">" in sign else bound + step
        within = bound + step if ">" in sign else bound - step
        inside += [typed(int(number) if whole else number) for number in (within, *([bound] if "=" in sign else []))]
        outside += [typed(int(number) if whole else number) for number in (beyond, *([] if "=" in sign else [bound]))]
    if whole:
        outside.append("1.5")
    if "number" in values:
        outside.append("[1]")
    choices = re.search(r"(one of|a list of) ((?:[\w.-]+, )+(?!or\b|as\b)[\w.-]+)", values)
    if choices:
        inside += choices[2].split(", ")
        outside += ["nonesuch", f"{choices[2].split(', ')[0]}x"]
    if "a list of" in values and choices:
        inside.append(choices[2].replace(" ", ""))
    if as_in := re.search(r"as in (\S+?)(?: or (\S+))?$", values):
        inside += [word for word in as_in.groups() if word]
        outside.append("a b")
    if values == "true or false":
        inside, outside = ["true", "false"], ["1", "yes"]
    if values.startswith("text"):
        inside, outside = ["a.b"], [""]
    if values.startswith("one side or height,width"):
        inside, outside = ["32", "4096", "384,640"], ["0", "4128", "33", "32,32,32"]
    for word in ("null", "auto"):
        if word in re.split(r", or | or |, | ", values):
            inside.append(word)
        elif not values.startswith("text") and "names" not in values:
            outside.append(word)
    if values.startswith("text") and "null" not in values:
        outside.append("null")
    return inside, outside


class Model(BaseModel):
    number: Annotated[int | Literal["auto"], knob("x", when="x", group="Training")] = "auto"
    limited: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], knob("x", when="x", group="Training")] = "auto"
    both: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"] | None, knob("x", when="x", group="Training")] = (
        None
    )
    nested: Annotated[Annotated[int, knob("y", when="y", group="Loss", ge=0, le=9)] | None, Field(lt=7)] = None
    words: Annotated[Literal["a", "b"] | Literal["auto"], knob("x", when="x", group="Training")] = "auto"
    text: Annotated[Annotated[str, Field(pattern="x")] | None, knob("x", when="x", group="Training")] = None


def test_values_of_unions() -> None:
    """Limits are found wherever they stand; single words come first, null last."""
    assert {name: allowed(field) for name, field in Model.model_fields.items()} == {
        "number": "auto or a whole number",
        "limited": "auto or a whole number >= 1",
        "both": "auto, a number > 0 or null",
        "nested": "a whole number >= 0 and <= 9 and < 7 or null",
        "words": "auto or one of a, b",
        "text": "text or null",
    }
    assert [name for name, field in Model.model_fields.items() if takes_text(field)] == ["text"]
    assert Model(limited=1).limited == 1
    with pytest.raises(ValidationError):
        Model(limited=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (16, "16"), (1.0, "1"), (99.99, "99.99"), (0.0005, "0.0005"), (1e6, "1000000"),
     (("fp32", "int8"), "fp32,int8"), ((384, 640), "384,640"), ("auto", "auto")],
)  # fmt: skip
def test_values_as_they_are_typed(value: object, text: str) -> None:
    assert typed(value) == text


@pytest.mark.parametrize("section", recipe.SECTIONS)
def test_without_all_the_advanced_knobs_are_counted_instead(section: str) -> None:
    knobs = {name: words(field).group for name, field in KNOBS.items() if name.startswith(f"{section}.")}
    common = {name for name, group in knobs.items() if group != "Advanced"}
    short, whole = help_text(section), help_text(section, everything=True)
    assert set(entries(short)) & set(KNOBS) == common and common
    assert set(entries(whole)) & set(KNOBS) == set(knobs)
    hidden = len(knobs) - len(common)
    last = short.split("\n")[-1]
    assert (last == f"{hidden} advanced knob{'s'[: hidden - 1]}: yolo-compress help {section} --all") == (hidden > 0)
    assert "\nAdvanced\n" not in short and ("\nAdvanced\n" in whole) == (hidden > 0)
    assert "advanced knob" not in whole


def test_groups_are_in_order_and_hold_their_knobs() -> None:
    text = help_text("prune", everything=True)
    at = [text.index(f"\n{group}\n") for group in ("Budget", "Criterion", "Training", "Advanced", "Options")]
    assert at == sorted(at)
    assert at[0] < text.index("prune.keep_flops") < at[1] < text.index("prune.criterion") < at[2]
    assert at[2] < text.index("prune.epochs") < at[3] < text.index("prune.momentum") < at[4] < text.index("dry_run ")


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("width", [80, 100, 300])
def test_lines_fit(width: int, everything: bool) -> None:
    for name in (None, *NAMES):
        lines = help_text(name, everything, width).split("\n")
        assert max(map(len, lines)) <= min(width, 100), name
        assert not any(line != line.rstrip() or "\u00a0" in line for line in lines), name


def test_the_width_is_the_terminals_and_80_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    command = [sys.executable, "-m", "yolo_compress", "help", "prune", "--all"]
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert piped.stdout == help_text("prune", True, 80) + "\n"
    monkeypatch.setenv("COLUMNS", "95")
    assert help_text("prune", True) == help_text("prune", True, 95) != help_text("prune", True, 80)
    monkeypatch.setenv("COLUMNS", "20")
    assert help_text("prune", True) == help_text("prune", True, 60), "narrower is not readable"


def test_the_program_shows_every_verb_under_its_heading() -> None:
    text = help_text()
    blocks = {block.split("\n")[0]: block for block in text.split("\n\n")}
    for verb, row in VERBS.items():
        assert f"\n  {verb} " in blocks[row.heading] and row.help in blocks[row.heading], "on one line"
    assert [heading for heading in blocks if heading in HEADINGS] == list(HEADINGS)
    assert all(name in text for name in recipe.names()) and f"; {DEFAULT_RECIPE} where none is given." in " ".join(
        text.split()
    )
    assert (
        "\n  yolo-compress init data.yaml=my.yaml weights=yolov8s.pt\n  yolo-compress run recipe=my-recipe.yaml\n"
        in text
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_shows_every_option_with_its_default_and_values(verb: str) -> None:
    row, shown = VERBS[verb], entries(help_text(verb))
    assert help_text(verb).split("\n")[0].startswith(f"yolo-compress {verb}: ")
    for option in row.options:
        entry = shown[option.name]
        assert entry.text == option.text and option.text.endswith(".")
        assert entry.default == ("required" if option.needed else option.default) and entry.default
        assert entry.values == (" or ".join(option.choices) or option.values) and entry.values
        assert entry.facts.endswith(f"; unit: {option.unit}") == bool(option.unit)
    assert ("section.key" in shown) == row.knobs
    if row.words is not None:
        entry = shown[row.words.usage]
        assert (
            entry.default == ("required" if row.words.least else row.words.default) and entry.values == row.words.values
        )


def option(verb: str, name: str) -> Entry:
    return entries(help_text(verb))[name]


def given(verb: str, *names: str) -> dict[str, str]:
    return {name: option(verb, name).default for name in names}


def refuses(verb: str, names: list[str], read: Any) -> None:
    """What lies beyond the values shown is refused, and what lies on their limits is not."""
    for name in names:
        inside, outside = examples(option(verb, name).values)
        assert inside and outside
        for text in inside:
            if text != "null":
                read({name: text})
        for text in outside:
            with pytest.raises(CompressError, match=name):
                read({name: text})


def test_options_of_predict_are_what_it_does() -> None:
    from yolo_compress.cli.predict import settings

    needed = {"source": "a.jpg", "engine": "e"}
    assert settings({**needed, **given("predict", "conf", "iou", "draw")}) == settings(needed)
    refuses("predict", ["conf", "iou", "engines"], lambda options: settings(needed | options))


def test_options_of_ab_are_what_it_does() -> None:
    from yolo_compress.cli.ab import settings

    needed = {"a": "a.pt", "b": "b.pt", "data": "d.yaml"}
    assert settings({**needed, **given("ab", "conf", "margin", "replicates", "seed")}) == settings(needed)
    refuses("ab", ["conf", "margin", "replicates", "seed"], lambda options: settings(needed | options))


def test_options_of_bundle_are_what_it_does(tmp_path: Path) -> None:
    from yolo_compress.bundle.make import order
    from yolo_compress.bundle.targets.registry import TARGETS

    needed = {"out": str(tmp_path / "b"), "version": "7"}
    assert order({**needed, **given("bundle", "golden", "target", "force")}) == order(needed)
    refuses("bundle", ["golden", "version", "target"], lambda options: order(needed | options))
    assert option("bundle", "target").values == f"one of {', '.join(TARGETS)}"


def test_options_of_lint_and_fetch_are_what_they_take() -> None:
    from yolo_compress.cli.fetch import fetch
    from yolo_compress.lint.targets import DEFAULT, TARGETS

    assert option("lint", "target") == Entry(
        f"default {DEFAULT}; one of {', '.join(TARGETS)}", VERBS["lint"].options[0].text
    )
    with pytest.raises(RecipeError, match=f"expected {option('fetch', 'NAME ...').values}"):
        fetch("yolov9.pt")


def test_options_of_rollout_are_what_it_does() -> None:
    from yolo_compress.cli.rollout import _cap
    from yolo_compress.rollout.judge import Budgets, budgets
    from yolo_compress.rollout.state import STAGES, stage_of

    assert budgets(option("rollout", "budgets").default) == Budgets()
    stages = option("rollout", "stage").values.removeprefix("one of ").split(", ")
    assert [stage_of(stage) for stage in stages] == list(range(len(STAGES)))
    assert option("rollout", "stage").default.endswith(stages[0])
    assert _cap(option("rollout", "cap").default) == 1 and _cap("0.01") == _cap("1%") == 0.01
    for text in ("0.009", "101%", "2"):
        with pytest.raises(RecipeError, match="expected a share of the robots from 0.01 to 1, or 1% to 100%"):
            _cap(text)
