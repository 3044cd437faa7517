"""The verbs of the command line and their options: one row each, from which usage, help and the parser are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Heading = Literal["The chain", "Use the result", "Robots", "Housekeeping"]
HEADINGS: tuple[Heading, ...] = get_args(Heading)  # the order in which the help shows the verbs

DEFAULT_RECIPE = "custom"


@dataclass(frozen=True)
class Option:
    """An option of a verb, `name=VALUE` or `--name VALUE`.

    Attributes:
        name: left side.
        form: right side as the usage line shows it; empty for a switch, `--name`.
        text: what it does, and when to set it.
        default: as the help shows it.
        values: the values it takes; `choices` say it where they are given.
        unit: of its values.
        needed: whether the verb cannot do without it.
        choices: the only words it takes; any text where empty.
    """

    name: str
    form: str
    text: str
    default: str = "none"
    values: str = ""
    unit: str = ""
    needed: bool = False
    choices: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """The option in a usage line, in brackets where it may be left out."""
        text = f"{self.name}={self.form}" if self.form else f"--{self.name}"
        return text if self.needed else f"[{text}]"

    @property
    def switch(self) -> bool:
        """Whether `--name` alone says true."""
        return self.choices == SWITCH


# Packed by hand: a few lines an option instead of a dozen.
# fmt: off
SWITCH = ("true", "false")
RECIPE = Option("recipe", "NAME|FILE", "Recipe to follow.", DEFAULT_RECIPE, "name of a shipped recipe, or a .yaml file")
LOCK = Option("lock", "fail", "What to do while another call uses the store: wait for it, or fail with exit code 75.",
              "wait", choices=("wait", "fail"))
FORCE = Option("force", "true", "Run the stage of the verb again although it is up to date; with run, the report.",
               "false", choices=SWITCH)
_ART = ("an engine folder, a .onnx file, a .pt file, or BENCH:ROW, a row of a bench, as in "
        "weights/digits/bench:compressed-onnxruntime-int8")


DATA = Option("data.yaml", "FILE", "Data set to look at.", values="a data set file", needed=True)


def _conf(text: str) -> Option:
    return Option("conf", "0.25", text, "0.25", "a number >= 0 and <= 1", "fraction")


@dataclass(frozen=True)
class Verb:
    """A verb.

    Attributes:
        help: its line in the help.
        heading: where the help shows it.
        options: what it takes beside the recipe's knobs.
        words: bare words that follow it; their name is what the usage line shows.
        knobs: whether it takes the recipe's knobs, `section.key=value`.
    """

    help: str
    heading: Heading
    options: tuple[Option, ...] = (RECIPE, LOCK, FORCE)
    words: Option | None = None
    knobs: bool = True

    @property
    def form(self) -> str:
        """What follows the verb in its usage line."""
        parts = [option.usage for option in self.options]
        if self.knobs:
            after = parts.index(RECIPE.usage) + 1 if RECIPE in self.options else len(parts)
            parts.insert(after, "[section.key=value ...]")
        return " ".join(parts if self.words is None else [self.words.name, *parts])

    @property
    def needed(self) -> tuple[str, ...]:
        """The options that it cannot do without."""
        return tuple(option.name for option in self.options if option.needed)

    def option(self, name: str) -> Option | None:
        """Its option of that name."""
        return next((option for option in self.options if option.name == name), None)


VERBS = {
    "init": Verb("write a recipe for your own data; trains nothing", "The chain", (
        DATA,
        Option("weights", "FILE.pt", "Checkpoint of the model to compress. One of the same classes is used as it is; from one of "
               "other classes the training starts.", values="a YOLOv8 checkpoint", needed=True),
        Option("teacher", "FILE.pt", "Checkpoint of a larger model that teaches, likewise.", "none, the unpruned model teaches",
               "a checkpoint"),
        Option("target", "NAME", "Where the engine will run: decides channel steps, weight bits and the least input size.", "cpu",
               "one of cpu, gpu, jetson-orin, jetson-xavier"),
        Option("out", "FILE.yaml", "Recipe to write.", "DATA-recipe.yaml", "a file .yaml that does not exist yet"),
    )),
    "run": Verb("run all stages of the recipe, up to the report", "The chain"),
    "teacher": Verb("load or train the teacher", "The chain"),
    "baseline": Verb("load or train the model that will be compressed", "The chain"),
    "sparsify": Verb("train with a penalty that makes unimportant channels small", "The chain"),
    "prune": Verb("remove channels to meet a budget, then fine-tune", "The chain", (
        RECIPE, LOCK, FORCE,
        Option("dry_run", "true", "Show the plan alone, in seconds: channels, GFLOPs, parameters and expected time.",
               "false", choices=SWITCH),
    )),
    "distill": Verb("fine-tune with the teacher's features and soft labels", "The chain"),
    "qat": Verb("calibrate INT8, then train with fake quantisation", "The chain"),
    "export": Verb("write ONNX files in FP32, FP16 and INT8, and TorchScript", "The chain"),
    "engine": Verb("build an engine for each runtime and precision", "The chain"),
    "bench": Verb("measure mAP, latency and size of every engine", "The chain"),
    "report": Verb("write report.html, .md and .json; exit code 1 when the gate fails", "The chain", (
        RECIPE, LOCK, FORCE,
        Option("add", "device.json[,more.json]", "Write another report that also shows these measurements of robots. The "
               "published report stays as it is. A file whose name has commas is taken as it is.",
               values="files that bench.py wrote on robots, or report.json of other recipes"),
        Option("out", "FOLDER", "With add: folder of that report.", "report-RECIPE", "a folder"),
    )),
    "predict": Verb("detect objects in images, videos or a camera: a JSON line per image", "Use the result", (
        Option("source", "IMAGE|FOLDER|VIDEO|CAMERA", "What to detect in.",
               values="a file, a folder, an address with ://, or the number of a camera", needed=True),
        Option("engine", "FOLDER", "Engine to use.", values="a folder below weights/RECIPE/engine", needed=True),
        Option("out", "FOLDER", "Folder for detections.jsonl.", "stdout", "a folder"),
        Option("draw", "true", "Also write the images with their boxes; needs out.", "false", choices=SWITCH),
        _conf("Score that a detection must exceed. Lower it to miss fewer objects."),
        Option("iou", "0.7", "Overlap (IoU) above which non-maximum suppression drops the box with the lower score. Raise it "
               "for crowded scenes.", "0.7", "a number >= 0 and <= 1", "fraction"),
        Option("engines", "N", "Engines that run at the same time. Set 1 for the shortest time per image.",
               "1 on a GPU, otherwise one per processor, at most 4", "a whole number >= 1 and <= 64", "engines"),
    ), knobs=False),
    "ab": Verb("test if model b is as good as a on the same images; exit code 1: no", "Use the result", (
        Option("a", "ART", "Model to compare with.", values=_ART, needed=True),
        Option("b", "ART", "Model to judge.", values="as a", needed=True),
        Option("data", "DATA.yaml", "Data set; its validation images are used.", values="a data set file", needed=True),
        Option("imgsz", "SIDE|HEIGHT,WIDTH", "Size of the models' input. Set it to compare two .pt files.",
               "the size of the engines", "one side or height,width, multiples of 32", "px"),
        _conf("Score at which detections are compared one by one. Set the threshold that your program uses."),
        Option("margin", "0.01", "Fraction of a's mAP50-95 that b may lose and still pass.", "0.01",
               "a number >= 0 and <= 1", "fraction"),
        Option("replicates", "1000", "Bootstrap resamples of the images for every interval.", "1000",
               "a whole number >= 1 and <= 100000", "resamples"),
        Option("seed", "0", "Seed of the resamples.", "0", "a whole number >= 0 and <= 4294967295"),
        Option("out", "FILE.json", "File for the whole comparison.", "none", "a file"),
    ), knobs=False),
    "lint": Verb("find faults in any ONNX file before building it; exit code 1: errors", "Use the result", (
        Option("target", "NAME", "Runtime that will read the file.", "tensorrt",
               "one of tensorrt, tensorrt-8.2, tensorrt-8.5, tensorrt-8.6, tensorrt-10.3, tensorrt-10.13, tensorrt-10.16, "
               "tensorrt-11.4, dla-8.5, dla-10.3, dla-11.4, tensorrt-rtx, onnxruntime, openvino"),
    ), Option("FILE.onnx", "", "File to check; any ONNX file.", values="a file", needed=True), knobs=False),
    "bundle": Verb("write what a robot needs, as a folder or .tar; needs a passed gate", "Robots", (
        RECIPE, LOCK,
        Option("force", "true", "Write the bundle although the gate failed; the bundle then says so.", "false", choices=SWITCH),
        Option("out", "FOLDER|FILE.tar", "Where to write it.", values="a folder or a file .tar or .tar.gz that does not exist yet",
               needed=True),
        Option("target", "NAME", "Also write the files that this system expects.", "plain",
               "one of plain, isaac_ros, deepstream, triton"),
        Option("version", "N", "Version of the bundle. A robot installs only a higher one than it ever ran.", "the time, in seconds",
               "a whole number >= 1"),
        Option("key", "FILE", "Private key that signs the bundle, from `yolo-compress keygen`.", "none, not signed", "a file"),
        Option("golden", "N", "Validation images for the robot's self-test.", "4", "a whole number >= 1", "images"),
    )),
    "keygen": Verb("write a private key, and the public key that robots check with", "Robots", (
        Option("out", "FILE", "File of the private key; the public key goes to FILE.pub.",
               values="a file that does not exist yet", needed=True),
    ), knobs=False),
    "probe": Verb("write the model at several widths, for a robot to time its layers", "Robots", (
        RECIPE, Option("out", "FOLDER", "Where to write them.", values="a folder", needed=True),
    )),
    "rollout": Verb("judge a new model b by robot logs of a and b; exit code 1: abort", "Robots", (
        Option("a", "LOG.jsonl", "Log of the present model.", values="a file that detect.py --shadow wrote", needed=True),
        Option("b", "LOG.jsonl", "Log of the new model, on the same robot and images.", values="as a", needed=True),
        Option("truth", "LABELS.jsonl", "Labels of some of the images, so that missed objects count too.", "none", "a file"),
        Option("state", "FILE.json", "File that keeps the state from call to call.", "none, each call starts anew", "a file"),
        Option("stage", "5%", "Share of the robots that run b now.", "what state holds, else 1%", "one of 1%, 5%, 25%, 100%"),
        Option("cap", "25%", "Largest share of the robots that this call may lead to.", "100%",
               "a share from 0.01 to 1, or 1% to 100%"),
        Option("budgets", "NAME:NUMBER,...", "By how much b may be worse, and how many frames and hours are needed.",
               "problems:0.01, disagreement:0.2, count:0.1, score:0.1, p50_ratio:1.2, p99_ratio:1.5, recall:0.02, frames:500, hours:1",
               "each name once; a ratio >= 1, the others > 0 and < 1, frames and hours >= 0"),
        LOCK,
    ), knobs=False),
    "fetch": Verb("download weights or data; the only verb that uses the network", "Housekeeping", (), Option(
        "NAME ...", "", "What to download; digits is drawn here, without network.",
        values="yolov8n.pt to yolov8x.pt, coco128, coco or digits", needed=True), knobs=False),
    "check": Verb("check this machine and the data: torch, CUDA, TensorRT, disk, images", "Housekeeping", (RECIPE,)),
    "status": Verb("show which stages are up to date, which are not, and why", "Housekeeping", (RECIPE,)),
    "cfg": Verb("print the whole recipe as YAML, with defaults and overrides", "Housekeeping", (RECIPE,)),
    "gc": Verb("delete artefacts that no recipe uses; interrupted stages stay", "Housekeeping", (RECIPE, LOCK)),
    "help": Verb("print this help, or that of a verb or section with its knobs", "Housekeeping", (
        Option("all", "", "Show the advanced knobs too; without a verb: all knobs of all sections.", "false", choices=SWITCH),
    ), Option("[VERB|SECTION]", "", "What to explain.", "all verbs, without their knobs", "a verb, or a section of the recipe"),
                 knobs=False),
    "version": Verb("print the version", "Housekeeping", (), knobs=False),
}
# fmt: on
OPTIONS = {option.name: option for row in VERBS.values() for option in row.options}  # of any verb


def usage(name: str) -> str:
    """Gives the usage line of a verb."""
    return f"usage: yolo-compress {name} {VERBS[name].form}".rstrip()
