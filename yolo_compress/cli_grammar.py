"""The grammar of the command line: `yolo-compress VERB [recipe=NAME|FILE] [section.key=value ...] [lock=fail] ...`.

`key=value` is the form that users know from `yolo`; `--key value` and `--key=value` mean the same. Only words are taken
apart here: values are read by `recipe.load`, and the verbs are carried out elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from . import recipe
from .errors import RecipeError
from .explain import did_you_mean, got

DEFAULT_RECIPE = "custom"
OPTIONS = {
    "recipe": (),
    "lock": ("wait", "fail"),
    "force": ("true", "false"),
    "dry_run": ("true", "false"),
    "out": (),
    "target": (),
    "weights": (),
    "teacher": (),
    "source": (),
    "engine": (),
    "conf": (),
    "iou": (),
    "engines": (),
    "draw": ("true", "false"),
    "truth": (),
    "stage": (),
    "state": (),
    "cap": (),
    "budgets": (),
    "version": (),
    "key": (),
    "golden": (),
    "add": (),
    "a": (),
    "b": (),
    "data": (),
    "imgsz": (),
    "margin": (),
    "replicates": (),
    "seed": (),
}  # () stands for any text
_SWITCHES = ("force", "dry_run", "draw")  # `--force` alone says true
_WHERE = "command line"


_STAGE = "[recipe=NAME|FILE] [section.key=value ...] [lock=fail] [force=true]"
_READS = "[recipe=NAME|FILE] [section.key=value ...]"
_ART = (
    "ART is an engine FOLDER, FILE.onnx, FILE.pt, or BENCH:ROW as in weights/digits/bench:compressed-onnxruntime-int8"
)


@dataclass(frozen=True)
class Verb:
    """A verb: its line in the help, and the form of what follows it, which is also what it takes: brackets may be left out."""

    help: str
    form: str = _STAGE

    @property
    def options(self) -> tuple[str, ...]:
        """The options that it takes beside the recipe's knobs."""
        return tuple(re.findall(r"(?<![\w.])(\w+)=", self.form.partition(";")[0]))

    @property
    def needed(self) -> tuple[str, ...]:
        """The options that it cannot do without."""
        form, count = self.form, 1
        while count:
            form, count = re.subn(r"\[[^\[\]]*\]", "", form)
        return Verb("", form).options

    @property
    def knobs(self) -> bool:
        """Whether it takes the recipe's knobs."""
        return "section.key=" in self.form

    @property
    def words(self) -> bool:
        """Whether bare words follow it."""
        return bool(self.form) and "=" not in self.form.split()[0]


VERBS = {
    "init": Verb("look at data, checkpoint and machine, and write a commented recipe for them; trains nothing",
                 "data.yaml=FILE weights=FILE.pt [teacher=FILE.pt] [target=NAME] [out=FILE.yaml] [section.key=value ...]"),
    "run": Verb("run every stage of the recipe, up to the report"),
    "teacher": Verb("take or train the teacher"),
    "baseline": Verb("take or train the net to be compressed"),
    "sparsify": Verb("train with L1 on the BatchNorm gammas or group lasso, so that channels can go"),
    "prune": Verb("remove channels to a budget, then fine-tune; dry_run=true shows the plan alone, in seconds",
                  f"{_STAGE} [dry_run=true]"),
    "distill": Verb("fine-tune with the teacher's features and soft labels"),
    "qat": Verb("calibrate and train with fake quantisation for INT8"),
    "export": Verb("write ONNX in FP32, FP16 and INT8, and TorchScript"),
    "engine": Verb("build an engine for each runtime and precision found here"),
    "bench": Verb("measure mAP, latency and size of every engine"),
    "report": Verb("write report.html, .md, .json; exit 1 below report.min_retention; add=... puts robots beside",
                   f"{_STAGE} [add=device.json[,more.json] [out=FOLDER]]"),
    "bundle": Verb("write what a robot needs to out=FOLDER|FILE.tar, signed with key=FILE; not below the gate",
                   f"{_STAGE} out=FOLDER|FILE.tar [target=NAME] [version=N] [key=FILE] [golden=N]"),
    "keygen": Verb("write a private key to out=FILE, and the public half that robots pin to FILE.pub", "out=FILE"),
    "probe": Verb("write the net at several widths to out=FOLDER, whose layers a robot times for prune.latency_table",
                  f"{_READS} out=FOLDER"),
    "lint": Verb("look for faults of any ONNX file before an engine is built from it; exit code 1 at errors",
                 "FILE.onnx [target=NAME]"),
    "predict": Verb("detect in an image, a folder of images, a video or a camera (its number): one JSON line a picture",
                    "source=IMAGE|FOLDER|VIDEO|CAMERA engine=FOLDER [out=FOLDER] [draw=true] [conf=0.25] [iou=0.7] "
                    "[engines=N]"),
    "ab": Verb("say whether model b is as good as model a on the same images; exit code 1 unless it passes",
               "a=ART b=ART data=DATA.yaml [imgsz=SIDE|HEIGHT,WIDTH] [conf=0.25] [margin=0.01] [replicates=1000] [seed=0] "
               f"[out=FILE.json]; {_ART}"),
    "rollout": Verb("judge a canary b by shadow logs of a and b: advance or hold (exit code 0), or abort (1)",
                    "a=LOG.jsonl b=LOG.jsonl [truth=LABELS.jsonl] [state=FILE.json] [stage=5%] [cap=25%] "
                    "[budgets=NAME:NUMBER,...] [lock=fail]"),
    "fetch": Verb("download weights or data (yolov8l.pt, coco128, coco); the only verb that uses the network",
                  "NAME ... [force=true]"),
    "status": Verb("say which stages are up to date, which are stale, and why", _READS),
    "check": Verb("check this machine (torch, CUDA, TensorRT, disk, memory) and the recipe's data", _READS),
    "cfg": Verb("print the effective recipe as YAML", _READS),
    "gc": Verb("delete artefacts that no recipe refers to", f"{_READS} [lock=fail]"),
    "help": Verb("print this help, or that of a verb", "[VERB]"),
    "version": Verb("print the version", ""),
}  # fmt: skip
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
        RecipeError: unknown verb, option or knob (says which was probably meant), a word out of place, an option twice.
    """
    if not argv:
        return Command("help")
    if argv[0] in _FLAGS:
        argv = (_FLAGS[argv[0]], *argv[1:])
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        raise RecipeError(_unknown_verb(name))
    if "--help" in rest or "-h" in rest:
        return Command("help", words=(name,))
    verb, overrides, options, words = VERBS[name], [], dict[str, str](), []
    for key, value in _pairs(name, rest):
        if not key:
            words.append(value)
        elif key in verb.options or (key in OPTIONS and key not in recipe.SECTIONS):  # `engine` is both
            _check_option(name, key, value, options)
            options[key] = value
        elif not verb.knobs:
            raise RecipeError(f"{_WHERE}: {name} takes no {got(key)}; {usage(name)}")
        else:
            recipe.check_key(key, verb.options)
            overrides.append((key, value))
    _check_words(name, words, options)
    return Command(name, options.pop("recipe", DEFAULT_RECIPE), tuple(overrides), options, tuple(words))


def usage(name: str) -> str:
    """Gives the usage line of a verb."""
    return f"usage: yolo-compress {name} {VERBS[name].form}".rstrip()


def help_text(name: str | None = None) -> str:
    """Gives the help of a verb or section, or of the program."""
    if name:
        knobs = [(key, text.description or "") for key, text in recipe.options().items() if key.startswith(f"{name}.")]
        lines = [f"  {key:<26} {text}" for key, text in knobs]
        about = [VERBS[name].help, usage(name)] if name in VERBS else [f"section {name} of the recipe"]
        return "\n".join([*about, *(["", *lines] if lines else [])])
    lines = [f"  {verb:<10} {row.help}" for verb, row in VERBS.items()]
    end = f"Recipes: {', '.join(recipe.names())}, or a .yaml file; {DEFAULT_RECIPE} where none is given."
    first = f"usage: yolo-compress VERB {_STAGE}"
    return "\n".join(
        [
            first,
            "",
            *lines,
            "",
            end,
            "`yolo-compress help VERB` lists the knobs of a stage; so do `help data` and `help run`.",
        ]
    )


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
        elif key in _SWITCHES and (not rest or rest[0] not in OPTIONS[key]):
            yield key, "true"
        elif not rest or rest[0].startswith("--"):
            if key not in OPTIONS and VERBS[name].knobs:
                recipe.check_key(key, VERBS[name].options)
            raise RecipeError(f"{_WHERE}: {word} needs a value: {word} VALUE, or {key}=VALUE")
        else:
            yield key, rest.pop(0)


def _check_option(name: str, key: str, value: str, given: dict[str, str]) -> None:
    if key not in VERBS[name].options:
        if VERBS[name].knobs and any(option.endswith(f".{key}") for option in recipe.options()):
            recipe.check_key(key, VERBS[name].options)  # says which section it stands in
        raise RecipeError(f"{_WHERE}: {name} takes no {key}; {usage(name)}")
    if key in given:
        raise RecipeError(f"{_WHERE}: {key} is given twice: {got(given[key])} and {got(value)}")
    if OPTIONS[key] and value not in OPTIONS[key]:
        raise RecipeError(f"{_WHERE}: {key}: got {got(value)}, expected {' or '.join(OPTIONS[key])}")


def _check_words(name: str, words: list[str], options: dict[str, str]) -> None:
    if absent := [option for option in VERBS[name].needed if option not in options]:
        raise RecipeError(f"{_WHERE}: {name} needs {' and '.join(absent)}; {usage(name)}")
    if name == "report" and "out" in options and "add" not in options:
        raise RecipeError(f"{_WHERE}: out goes with add; the report itself is published under weights/; {usage(name)}")
    if name == "fetch" and not words:
        raise RecipeError(f"{_WHERE}: fetch needs a name; {usage(name)}")
    if name == "lint" and len(words) != 1:
        raise RecipeError(f"{_WHERE}: lint takes one file, got {len(words)}; {usage(name)}")
    if name == "help" and words and words[0] not in (*VERBS, *recipe.SECTIONS):
        raise RecipeError(_unknown_verb(words[0]))
    if name == "help" and len(words) > 1:
        raise RecipeError(f"{_WHERE}: {usage(name)}")
    if words and not VERBS[name].words:
        word = words[0]
        if word in VERBS:
            raise RecipeError(f"{_WHERE}: one verb a call, got {name} and {word}; a stage runs what it needs upstream")
        raise RecipeError(f"{_WHERE}: {got(word)} is out of place; expected key=value or --key value")


def _unknown_verb(word: str) -> str:
    if "=" in word or word.startswith("--"):
        return f"{_WHERE}: the verb comes first, got {got(word)}; verbs are {', '.join(VERBS)}"
    return f"{_WHERE}: unknown verb {got(word)}{did_you_mean(word, VERBS) or '; verbs are ' + ', '.join(VERBS)}"
