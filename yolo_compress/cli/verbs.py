"""Table of the verbs of the command line and their options. The parser, the usage lines and the help are made from this table.

To add a verb, add a row here and a file `cli/<verb>.py` with its function. No other module lists verbs or their options.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ..lint import targets as lint_targets
from ..rollout.state import STAGES as ROLLOUT_STAGES
from .init_targets import TARGETS as INIT_TARGETS

Heading = Literal["The chain", "Use the result", "Robots", "Housekeeping"]
HEADINGS: tuple[Heading, ...] = get_args(Heading)  # the order in which the help shows the verbs

DEFAULT_RECIPE = "custom"


@dataclass(frozen=True)
class Option:
    """An option of a verb, `name=VALUE` or `--name VALUE`.

    Attributes:
        name: Name on the left of `=`.
        form: Placeholder for the value in the usage line. Empty for a switch, `--name`.
        text: What the option does, and when to set it.
        default: Default value, as the help shows it.
        values: Description of the allowed values, if `choices` is empty.
        unit: Unit of the value.
        needed: Whether the verb requires the option.
        choices: The allowed values. Empty: any text is allowed.
        requires: Name of another option of the verb. Without that option, this option is an error.
        writes: Whether the value is a path that the verb writes. Such a path must be outside the store.
    """

    name: str
    form: str
    text: str
    default: str = "none"
    values: str = ""
    unit: str = ""
    needed: bool = False
    choices: tuple[str, ...] = ()
    requires: str = ""
    writes: bool = False

    @property
    def usage(self) -> str:
        """The option as the usage line shows it, in brackets if it is optional."""
        text = f"{self.name}={self.form}" if self.form else f"--{self.name}"
        return text if self.needed else f"[{text}]"

    @property
    def switch(self) -> bool:
        """Whether the option is a switch: `--name` without a value means true."""
        return self.choices == SWITCH


@dataclass(frozen=True)
class Words:
    """Description of the words without `=` after a verb, such as the file after `lint`.

    Attributes:
        usage: The words as the usage line shows them.
        noun: Name of one word in error messages.
        text: What the words are for.
        default: What the verb uses if there is no word, as the help shows it.
        values: Allowed words.
        least: Least number of words.
        most: Largest number of words. None: any number.
    """

    usage: str
    noun: str
    text: str
    values: str
    default: str = "none"
    least: int = 1
    most: int | None = 1

    @property
    def count(self) -> str:
        """Number of words that the verb takes, as text for an error message."""
        if self.most is None:
            return f"one or more {self.noun}s"
        return f"one {self.noun}" if self.least else f"at most one {self.noun}"

    @property
    def option(self) -> Option:
        """The words as an `Option`, for the help."""
        return Option(self.usage, "", self.text, self.default, self.values, needed=self.least > 0)


def one_of(names: Iterable[str]) -> str:
    """Return the text "one of ..." for the help. `names` is the list that the verb itself reads."""
    return "one of " + ", ".join(names)


# Packed by hand: a few lines an option instead of a dozen.
# fmt: off
SWITCH = ("true", "false")
RECIPE = Option("recipe", "NAME|FILE", "Recipe to follow.", DEFAULT_RECIPE, "name of a shipped recipe, or a .yaml file")
LOCK = Option("lock", "fail", "What to do while another command uses the store: wait for its end, or fail with exit code "
                              "75.",
              "wait", choices=("wait", "fail"))
FORCE = Option("force", "true", "Run the stage again, even if it is up to date. With the verb `run`, only `report` runs again.",
               "false", choices=SWITCH)
DATA = Option("data.yaml", "FILE", "Data set for which the recipe is written.", values="a data set file", needed=True)
STAGE = "yolo_compress.cli.stage:handle"
_MODEL = ("an engine folder, a policy folder, a .onnx file, a .pt file, or BENCH:ROW, a row of a bench, as in "
          "weights/digits/bench:compressed-onnxruntime-int8")
_ENGINE = "an engine folder, or a .onnx file, which ONNX Runtime runs"


def _conf(text: str) -> Option:
    return Option("conf", "0.25", text, "0.25", "a number >= 0 and <= 1", "fraction")


@dataclass(frozen=True)
class Verb:
    """A command of `yolo-compress`, such as `prune`: its options, its help, and the function that runs it.

    Attributes:
        name: The word on the command line.
        help: Line about the verb in the help.
        heading: Heading above the verb in the help.
        handler: `module:function` that runs the verb, `(grammar.Command) -> exit code`. Imported when the verb runs.
        options: Options of the verb, in addition to the recipe's knobs.
        words: Words without `=` that follow the verb. None: the verb takes none.
        knobs: Whether the verb takes the recipe's knobs, `section.key=value`.
        continues: Whether the same command, run again after an interrupt, continues where it stopped.
    """

    name: str
    help: str
    heading: Heading
    handler: str
    options: tuple[Option, ...] = (RECIPE, LOCK, FORCE)
    words: Words | None = None
    knobs: bool = True
    continues: bool = True

    @property
    def form(self) -> str:
        """The part of the usage line after the verb: words and options."""
        parts = [self.words.usage] if self.words else []
        for option in self.options:
            parts.append(option.usage)
            if self.knobs and option is RECIPE:
                parts.append(_KNOBS)
        return " ".join([*parts, _KNOBS] if self.knobs and RECIPE not in self.options else parts)

    @property
    def usage(self) -> str:
        """The usage line of the verb."""
        return f"usage: yolo-compress {self.name} {self.form}".rstrip()

    def option(self, name: str) -> Option | None:
        """Return the verb's option of this name, or None."""
        return next((option for option in self.options if option.name == name), None)


_KNOBS = "[section.key=value ...]"
VERBS = {row.name: row for row in (
    Verb("init", "write a recipe for your own data; trains nothing", "The chain", "yolo_compress.cli.init:handle", (
        DATA,
        Option("weights", "FILE.pt", "Checkpoint of the model to compress. If it has the classes of the data set, it is "
                                     "used without training. Otherwise the training starts from it.",
                                     values="a YOLOv8, YOLO11 or YOLO26 checkpoint", needed=True),
        Option("teacher", "FILE.pt", "Checkpoint of a larger model, the teacher. It is trained only if its classes differ "
                                     "from the data set.",
               "none, the unpruned model is the teacher", "a checkpoint"),
        Option("target", "NAME", "Class of the device that will run the engine. It decides prune.round_to, qat.weight_bits "
                                 "and the smallest input size.", "cpu",
               one_of(INIT_TARGETS)),
        Option("out", "FILE.yaml", "Recipe to write.", "DATA-recipe.yaml", "a file .yaml that does not exist yet", writes=True),
    ), continues=False),
    Verb("run", "run all stages of the recipe, up to the report", "The chain", STAGE),
    Verb("teacher", "load or train the teacher", "The chain", STAGE),
    Verb("baseline", "load or train the model that will be compressed", "The chain", STAGE),
    Verb("sparsify", "train with a penalty that makes unimportant channels small", "The chain", STAGE),
    Verb("prune", "remove channels to meet a budget, then fine-tune", "The chain", STAGE, (
        RECIPE, LOCK, FORCE,
        Option("dry_run", "true", "Only show what would be pruned: channels, GFLOPs, parameters and estimated latency. This "
                                  "takes seconds.",
               "false", choices=SWITCH),
    )),
    Verb("distill", "fine-tune with the teacher's features and soft labels", "The chain", STAGE),
    Verb("qat", "calibrate INT8, then train with fake quantisation", "The chain", STAGE),
    Verb("export", "write ONNX files in FP32, FP16 and INT8, and TorchScript", "The chain", STAGE),
    Verb("engine", "build an engine for each runtime and precision", "The chain", STAGE),
    Verb("bench", "measure mAP, latency and size of every engine", "The chain", STAGE),
    Verb("control", "train the models that the compressed one is compared with", "The chain", STAGE),
    Verb("search", "find the knobs that keep the most mAP within a latency or size", "The chain",
         "yolo_compress.cli.search:handle", (
        RECIPE,
        Option("study", "NAME", "Name of the study. The same command continues it. Its folder is searches/NAME.",
               values="a name that can be a folder", needed=True),
    ), Words("[status|worker|report]", "word", "status: show a study. worker: join a study, from any machine that shares its folders. "
             "report: write its report now.", "status, worker or report", "run the study, or continue it", least=0)),
    Verb("report", "write report.html, .md and .json; exit code 1 when the gate fails", "The chain", STAGE, (
        RECIPE, LOCK, FORCE,
        Option("add", "device.json[,more.json]", "Write a second report, which also shows the measurements in these files. "
                                                 "The first report does not change. Commas separate the files.",
               values="files that bench.py wrote on robots, report.json of other recipes, or cascade.json of a policy folder"),
        Option("out", "FOLDER", "Folder for the second report. It needs `add`.", "report-RECIPE", "a folder", requires="add",
               writes=True),
    )),
    Verb("predict", "detect objects in images, videos or a camera: a JSON line per image", "Use the result",
         "yolo_compress.cli.predict:handle", (
        Option("source", "IMAGE|FOLDER|VIDEO|CAMERA", "Images in which to detect objects.",
               values="a file, a folder, an address with ://, or the number of a camera", needed=True),
        Option("engine", "FOLDER", "Engine or cascade that detects the objects.",
               values="a folder below weights/RECIPE/engine, or a policy folder that `cascade` wrote", needed=True),
        Option("out", "FOLDER", "Folder for detections.jsonl.", "stdout", "a folder", writes=True),
        Option("draw", "true", "Also write the images with boxes drawn on them. This needs `out`.", "false", choices=SWITCH),
        _conf("Score threshold. Only detections with a higher score are written. Lower it to miss fewer objects."),
        Option("iou", "0.7", "Largest overlap (IoU) of two boxes of a class. Non-maximum suppression drops the box with the "
                             "lower score if they overlap more. No effect on YOLO26. Raise it for crowded scenes.",
                             "0.7", "a number >= 0 and <= 1", "fraction"),
        Option("engines", "N", "Number of engines that run in parallel. Set 1 for the shortest time per image.",
               "1 on a GPU, otherwise one per processor, at most 4", "a whole number >= 1 and <= 64", "engines"),
    ), knobs=False, continues=False),
    Verb("ab", "test whether model b is as good as model a; exit code 1: no", "Use the result",
         "yolo_compress.cli.ab:handle", (
        Option("a", "MODEL", "Model in use, such as the baseline.", values=_MODEL, needed=True),
        Option("b", "MODEL", "New model, which is judged.", values="as for a", needed=True),
        Option("data", "DATA.yaml", "Data set whose validation images are used.", values="a data set file", needed=True),
        Option("imgsz", "SIDE|HEIGHT,WIDTH", "Size of the models' input. Set it to compare two .pt files.",
               "the size of the engines", "one side or height,width, multiples of 32", "px"),
        _conf("Score threshold for the comparison of single detections. Set the threshold that your program uses."),
        Option("margin", "0.01", "Fraction of model a's mAP50-95 that model b may lose and still pass.", "0.01",
               "a number >= 0 and <= 1", "fraction"),
        Option("replicates", "1000", "Number of bootstrap resamples of the images for each interval.", "1000",
               "a whole number >= 1 and <= 100000", "resamples"),
        Option("seed", "0", "Seed of the resamples.", "0", "a whole number >= 0 and <= 4294967295"),
        Option("out", "FILE.json", "File for the complete result.", "none", "a file", writes=True),
    ), knobs=False, continues=False),
    Verb("cascade", "run a large model only where a small one needs it; exit code 1: no", "Use the result",
         "yolo_compress.cli.cascade:handle", (
        Option("small", "ENGINE", "Fast model. Every image goes through it.", values=_ENGINE, needed=True),
        Option("large", "ENGINE", "Slow model of the same classes. Only images that are expected to gain go through it too. It may "
               "be the same model at a larger image size.", values="as for small", needed=True),
        Option("data", "DATA.yaml", "Data set. The router is fitted to its training images. All figures are of its validation "
               "images.", values="a data set file", needed=True),
        Option("latency_ms", "MS", "Largest mean latency of an image, from the decoded image to its detections. It has to be "
               "between those of small and large. Not together with `max_drop`.",
               "none, the share of images is chosen that gains most", "a number > 0", "ms"),
        Option("max_drop", "0.01", "Fraction of the large model's mAP50-95 that the cascade may lose. As few images as that allows "
               "go to the large model. Not together with `latency_ms`.", values="a number >= 0 and < 1", unit="fraction"),
        Option("static", "ENGINE", "Third model to compare with: the best one that you have between small and large.",
               values="as for small"),
        Option("out", "FOLDER", "Policy folder to write. Use it like an engine folder.",
               values="a folder that does not exist yet", needed=True, writes=True),
        Option("force", "true", "Write the policy folder even if the cascade is not recommended.", "false", choices=SWITCH),
        Option("replicates", "1000", "Number of bootstrap resamples of the images for the interval.", "1000",
               "a whole number >= 1 and <= 100000", "resamples"),
        Option("seed", "0", "Seed of the resamples and of the folds of the cross-validation.", "0",
               "a whole number >= 0 and <= 4294967295"),
    ), knobs=False, continues=False),
    Verb("lint", "find faults of an ONNX file; exit code 1: there are errors", "Use the result",
         "yolo_compress.cli.lint:handle", (
        Option("target", "NAME", "Runtime that will execute the file.", lint_targets.DEFAULT, one_of(lint_targets.TARGETS)),
    ), Words("FILE.onnx", "file", "ONNX file to check. Any program may have written it.", "a file"), knobs=False, continues=False),
    Verb("bundle", "write a folder or .tar for the robot; the gate must have passed", "Robots",
         "yolo_compress.cli.bundle:handle", (
        RECIPE, LOCK,
        Option("force", "true", "Write the bundle even if the model did not pass the report's gate. The manifest of the "
               "bundle then says so.", "false", choices=SWITCH),
        Option("out", "FOLDER|FILE.tar", "Folder or archive to write.",
                                         values="a folder or a file .tar or .tar.gz that does not exist yet",
               needed=True, writes=True),
        Option("target", "NAME", "System for which configuration files are added. plain: no such files.", "plain",
               "one of plain, isaac_ros, deepstream, triton"),
        Option("version", "N", "Version of the bundle. A robot installs a bundle only if its version is higher than those "
                               "of all earlier bundles.", "the Unix time in seconds",
               "a whole number >= 1"),
        Option("key", "FILE", "Private key that signs the bundle, from `yolo-compress keygen`.", "none, not signed", "a file"),
        Option("golden", "N", "Number of validation images for the robot's self-test.", "4", "a whole number >= 1", "images"),
        Option("cascade", "FOLDER", "Policy folder of a cascade that the bundle gets too. One of its models is the recipe's.", "none",
               "a folder that `cascade` wrote"),
    )),
    Verb("keygen", "write a private key, and the public key that robots check with", "Robots", "yolo_compress.cli.keygen:handle", (
        Option("out", "FILE", "File of the private key; the public key goes to FILE.pub.",
               values="a file that does not exist yet", needed=True, writes=True),
    ), knobs=False, continues=False),
    Verb("probe", "write the model at several widths, for a robot to time its layers", "Robots", "yolo_compress.cli.probe:handle", (
        RECIPE, Option("out", "FOLDER", "Folder for the models.", values="a folder", needed=True, writes=True),
    )),
    Verb("rollout", "judge a new model b from logs of robots; exit code 1: abort", "Robots",
         "yolo_compress.cli.rollout:handle", (
        Option("a", "LOG.jsonl", "Log of the model in use.", values="a file that detect.py --shadow wrote", needed=True),
        Option("b", "LOG.jsonl", "Log of the new model, on the same robot and images.", values="as for a", needed=True),
        Option("truth", "LABELS.jsonl", "Labels of some of the images. With them, the verdict also covers missed objects.",
                                        "none", "a file"),
        Option("state", "FILE.json", "File that keeps the state of the release between calls.",
                                     "none, each call starts a new release", "a file",
               writes=True),
        Option("stage", "5%", "Share of the robots that run the new model (b) now.", "the share in the state file, else 1%",
               one_of(f"{share:.0%}" for share in ROLLOUT_STAGES)),
        Option("cap", "25%", "Largest share of the robots that may run b after this call.", "100%",
               "a share from 0.01 to 1, or 1% to 100%"),
        Option("budgets", "NAME:NUMBER,...", "Limits for how much worse b may be, and the numbers of frames and hours "
                                             "that must be logged before more robots may run b.",
               "problems:0.01, disagreement:0.2, count:0.1, score:0.1, p50_ratio:1.2, p99_ratio:1.5, recall:0.02, frames:500, hours:1",
               "each name once; a ratio >= 1, the others > 0 and < 1, frames and hours >= 0"),
        LOCK,
    ), knobs=False, continues=False),
    Verb("fetch", "download weights or data; the only verb that uses the network", "Housekeeping", "yolo_compress.cli.fetch:handle",
         (), Words("NAME ...", "name", "Names of the files or data sets to download. digits is drawn on this machine, "
                                       "without network.",
                   "yolov8n.pt to yolov8x.pt, coco128, coco, digits or digits_many", most=None), knobs=False),
    Verb("check", "check this machine and the data: torch, CUDA, TensorRT, disk, images", "Housekeeping",
         "yolo_compress.cli.check:handle", (RECIPE,)),
    Verb("status", "show which stages are up to date, and why others are not", "Housekeeping",
         "yolo_compress.cli.status:handle", (RECIPE,)),
    Verb("cfg", "print the whole recipe as YAML, with defaults and overrides", "Housekeeping",
         "yolo_compress.cli.cfg:handle", (RECIPE,)),
    Verb("gc", "delete artefacts that no recipe uses; interrupted stages stay", "Housekeeping",
         "yolo_compress.cli.gc:handle", (RECIPE, LOCK)),
    Verb("help", "print this help, or the help of a verb or section", "Housekeeping",
         "yolo_compress.cli.helptext:handle", (
        Option("all", "", "Also show the advanced knobs. Without a verb, show all knobs of all sections.", "false", choices=SWITCH),
    ), Words("[VERB|SECTION]", "verb or section", "Verb or section to explain.", "a verb, or a section of the recipe",
             "all verbs, without their knobs", least=0), knobs=False),
    Verb("version", "print the version", "Housekeeping", "yolo_compress.cli.version:handle", (), knobs=False),
)}
# fmt: on


def options() -> dict[str, Option]:
    """Return the options of all verbs by name. A name that several verbs use occurs once."""
    return {option.name: option for row in VERBS.values() for option in row.options}
