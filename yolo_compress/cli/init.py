"""`yolo-compress init`: inspect data, checkpoints and machine, and write a recipe with a reason for each value. Nothing is trained."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_compress import home, preflight
from yolo_compress.cli import estimate
from yolo_compress.cli.grammar import Command
from yolo_compress.cli.init_targets import TARGETS
from yolo_compress.data.dataset import Dataset, Sample
from yolo_compress.errors import RecipeError
from yolo_compress.files import strict_yaml
from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.progress import result
from yolo_compress.prune.cost import parameters
from yolo_compress.recipe import auto_values, recipe
from yolo_compress.recipe.messages import did_you_mean, got
from yolo_compress.recipe.sections import QatConfig, SourceConfig
from yolo_compress.runtime.measure.device import cpu_model, usable_cpus
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint as train_checkpoint
from yolo_compress.train import transfer

COMMENT_COLUMN = 32
REST_MINUTES = 4  # estimated time of export, engine, bench and report


@dataclass(frozen=True)
class Order:
    """The options of the verb `init` on the command line."""

    data: str
    weights: str
    teacher: str | None
    target: str
    out: Path
    overrides: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Facts:
    """Facts that `look` found about the data set, the checkpoints and the machine."""

    dataset: Dataset
    origins: dict[str, str]  # baseline and teacher -> weights or pretrained
    models: dict[str, nn.Module]
    device: str
    cores: int


def handle(command: Command) -> int:
    """Write the recipe that suits the data and the target. Print the recipe and the commands to run next."""
    made = run(order(command.options, command.overrides))
    result(made.pop("text"))
    result(f"written to {made['recipe']}; next:")
    for line in made["next"]:
        result(f"  {line}")
    result(json.dumps(made))
    return 0


def order(options: Mapping[str, str], overrides: Sequence[tuple[str, str]]) -> Order:
    """Read the options of the command line.

    Raises:
        RecipeError: The target is unknown, `out` exists or does not end in .yaml, or an override sets the weights.
    """
    if (target := options.get("target", "cpu")) not in TARGETS:
        hint = did_you_mean(target, TARGETS) or f"; targets are {', '.join(TARGETS)}"
        raise RecipeError(f"command line: target: got {got(target)}{hint}")
    for knob, _ in overrides:
        if knob.partition(".")[0] in ("baseline", "teacher") and knob.partition(".")[2] in SourceConfig.ORIGINS:
            option = "weights" if knob.startswith("baseline") else "teacher"
            raise RecipeError(
                f"command line: init takes {option}=FILE and chooses {knob} or its alternative by the classes"
            )
    out = Path(options.get("out", f"{Path(options['data.yaml']).stem}-recipe.yaml"))
    if out.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"command line: out: got {got(str(out))}, expected a name that ends in .yaml")
    if os.path.lexists(out):
        raise RecipeError(f"{out} exists; give another out=FILE.yaml, or delete it")
    return Order(options["data.yaml"], options["weights"], options.get("teacher"), target, out, tuple(overrides))


def run(asked: Order) -> dict[str, Any]:
    """Inspect the data, the checkpoints and the machine, and write the recipe file.

    Returns:
        `recipe` (the file), `text` (its content), `minutes` (estimate by stage) and `next` (commands).

    Raises:
        CompressError: The data or a checkpoint could not be used in a run, or the file cannot be written.
    """
    with storage_errors(asked.out), tempfile.TemporaryFile(dir=asked.out.parent):
        pass  # if the folder is not writable, fail now and not after minutes
    facts = look(asked)
    sections = compose(asked, facts)
    plain = {name: {knob: value for knob, value, _ in rows} for name, rows in sections.items()}
    document = strict_yaml.parse(strict_yaml.dump(plain), str(asked.out))
    chosen = recipe.build(document, asked.out.stem, asked.overrides)
    preflight.check(chosen, facts.dataset)
    # overrides may be `auto`
    sized = auto_values.resolve(chosen, len(facts.dataset.train), len(facts.dataset.names))
    seconds = estimate.seconds(sized, facts.dataset, facts.models)
    text = _text(TARGETS[asked.target].title, _as_asked(sections, chosen, asked.overrides), seconds)
    atomic_write(asked.out, text)
    commands = ("yolo-compress run recipe={recipe}", *TARGETS[asked.target].after)
    words = {"recipe": str(asked.out), "name": asked.out.stem, "weights": str(home.weights())}
    return {
        "recipe": str(asked.out),
        "text": text,
        "minutes": {**{stage: round(value / 60, 1) for stage, value in seconds.items()}, "rest": REST_MINUTES},
        "next": [command.format_map({key: shlex.quote(word) for key, word in words.items()}) for command in commands],
    }


def look(asked: Order) -> Facts:
    """Inspect the data set, the checkpoints and the machine, and return the facts.

    Raises:
        CompressError: The data or a checkpoint could not be used in a run.
    """
    knobs = dict(asked.overrides)
    minimal = {"data": {"yaml": asked.data}, "baseline": {"model": "yolov8n.yaml"}}
    data_overrides = [(key, text) for key, text in asked.overrides if key.startswith("data.")]
    plain = recipe.build(strict_yaml.parse(strict_yaml.dump(minimal), str(asked.out)), asked.out.stem, data_overrides)
    _, dataset = preflight.prepare(plain, Store(home.weights()))
    origins, models = {}, {}
    for stage, checkpoint in (("baseline", asked.weights), ("teacher", asked.teacher)):
        if checkpoint is not None:
            known = train_checkpoint.class_names(find_weights(checkpoint))
            origins[stage] = "weights" if known == list(dataset.names) else "pretrained"
            models[stage] = _start(
                find_weights(checkpoint), origins[stage], dataset, knobs.get(f"{stage}.detection_part")
            )
    device = knobs.get("run.device") or ("0" if torch.cuda.is_available() else "cpu")
    return Facts(dataset, origins, models, device, usable_cpus())


def _start(path: Path, origin: str, dataset: Dataset, detection_part: str | None) -> nn.Module:
    """Load the model that a stage starts from. `preflight.check` checks later whether this model fits the data set."""
    if origin == "weights":
        return train_checkpoint.load_model(path)
    return transfer.load_pretrained(path, dataset.names, 0, detection_part == "true")[0]


Section = list[tuple[str, Any, str]]  # (knob, value, reason) of each row


def compose(asked: Order, facts: Facts) -> dict[str, Section]:
    """Return the sections of the new recipe: for each knob its value and the reason. Overrides are not applied yet."""
    dataset, target = facts.dataset, TARGETS[asked.target]
    images = len(dataset.train)
    sections: dict[str, Section] = {
        "data": [("yaml", asked.data, _describe_data(dataset)), ("imgsz", *_imgsz(asked, facts))],
        "run": [("device", facts.device, _describe_machine(facts))],
    }
    for stage in ("teacher", "baseline"):
        if stage in facts.origins:
            sections[stage] = _source(stage, asked, facts)
    sections["prune"] = [
        ("keep_flops", 0.5, "half of the MACs; less is faster, more is safer"),
        ("round_to", target.round_to.value, target.round_to.why),
        *_trained("prune", images, asked),
        (
            "teach_from_parent",
            True,
            "the unpruned baseline teaches; without a larger teacher there is no section distill",
        ),
        ("mosaic", 0.5, "half of the images whole, half mosaics of four"),
    ]
    if asked.teacher or any(key.partition(".")[0] == "distill" for key, _ in asked.overrides):
        sections["distill"] = [
            *_trained("distill", images, asked),
            ("lr0", 0.0005, "fine steps on a recovered model"),
            ("mosaic", 0.5, ""),
        ]
    sections["qat"] = [
        *[row for row in _trained("qat", images, asked) if row[0] != "close_mosaic"],
        ("weight_bits", target.weight_bits.value, target.weight_bits.why),
    ]
    if images < (asked_images := QatConfig.model_fields["calib_images"].default):
        sections["qat"].append(("calib_images", images, f"all there are; {asked_images} where there are more"))
    sections |= {name: [] for name in ("export", "engine", "bench")}
    gate = auto_values.min_retention(len(dataset.val))
    sections["report"] = [("min_retention", gate.value, gate.why)]
    return sections


def _as_asked(
    sections: Mapping[str, Section], chosen: recipe.Recipe, overrides: Sequence[tuple[str, str]]
) -> dict[str, Section]:
    """Return the sections with the overrides applied. Knobs that an override excludes, such as another budget, are dropped."""
    asked = {key for key, _ in overrides}
    out = {}
    for name in recipe.SECTIONS:
        if (section := getattr(chosen, name)) is None:
            continue
        values = section.model_dump(mode="json")
        ours = sections.get(name, [])
        rows = {row[0]: row for row in ours if f"{name}.{row[0]}" in asked or values[row[0]] == row[1]}
        rows |= {knob: (knob, values[knob], "as asked") for knob in values if f"{name}.{knob}" in asked}
        if rows or name in sections or name in asked:
            out[name] = list(rows.values())
    return out


def _source(stage: str, asked: Order, facts: Facts) -> Section:
    """Return the section of the baseline or teacher, with a schedule if it has to be trained."""
    model, images = facts.models[stage], len(facts.dataset.train)
    checkpoint = asked.weights if stage == "baseline" else str(asked.teacher)
    size = f"{parameters(model) / 1e6:.1f} M parameters"
    if facts.origins[stage] == "weights":
        return [("weights", checkpoint, f"{size}; knows these classes, so it is taken as it is")]
    start: Section = [("pretrained", checkpoint, f"{size}; other classes, so training starts from it")]
    return [*start, *_trained(stage, images, asked)]


def _trained(stage: str, images: int, asked: Order) -> Section:
    """Return the training schedule of a stage, from the number of images and an override of the epochs."""
    epochs = auto_values.epochs(stage, images)
    given = dict(asked.overrides).get(f"{stage}.epochs", "")
    last = auto_values.close_mosaic(int(given) if given.isdecimal() and len(given) < 9 else epochs.value)
    rules = {"epochs": epochs, "batch": auto_values.batch(images), "close_mosaic": last}
    return [(knob, choice.value, choice.why) for knob, choice in rules.items()]


def _imgsz(asked: Order, facts: Facts) -> tuple[int, str]:
    if facts.origins["baseline"] == "weights":
        return 640, "Ultralytics' default; set the size that the checkpoint was trained at"
    choice = auto_values.imgsz(facts.dataset.train, TARGETS[asked.target].smallest_px)
    return choice.value, choice.why


def _describe_data(dataset: Dataset) -> str:
    boxes = [len(sample.boxes) for sample in dataset.train]
    return (
        f"{len(dataset.train):,} training and {len(dataset.val):,} validation images of {_image_size(dataset.train)} px, "
        f"{len(dataset.names)} class{'es' if len(dataset.names) != 1 else ''}, {statistics.mean(boxes):.1f} objects an image"
    )


def _image_size(samples: Sequence[Sample]) -> str:
    """Return the size of the images in px, as text. If the sizes differ, return the most frequent size."""
    sizes = [(sample.width, sample.height) for sample in samples]
    width, height = statistics.mode(sizes)
    return f"{width}x{height}" if len(set(sizes)) == 1 else f"{width}x{height} (most frequent)"


def _describe_machine(facts: Facts) -> str:
    if facts.device != "cpu":
        index = int(facts.device.split(",")[0])
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        return f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
    return f"{cpu_model()}, {facts.cores} cores, {environment.memory_bytes() / 2**30:.0f} GiB; no CUDA device"


def _text(title: str, written: Mapping[str, Section], seconds: Mapping[str, float]) -> str:
    """Return the text of the recipe, with reasons and estimated times as comments."""
    total = _minutes(sum(seconds.values()) + 60 * REST_MINUTES)
    lines = [
        f"# By `yolo-compress init`, for {title}; every number may be changed. All takes about {total} on this machine."
    ]
    for name, rows in written.items():
        if not rows:
            lines.append(f"{name}: {{}}")
            continue
        lines.append(f"{name}:")
        for knob, value, why in rows:
            here = f"about {_minutes(seconds[name])} here" if knob == "epochs" and name in seconds else ""
            note = "; ".join(part for part in (why, here) if part)
            text = f"  {knob}: {_scalar(value)}"
            lines.append(f"{text:<{COMMENT_COLUMN}}  # {note}" if note else text)
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Return a value as one line of YAML."""
    text = strict_yaml.dump({"": value}).partition(":")[2].strip()
    return text if "\n" not in text and not isinstance(value, list) else json.dumps(value, ensure_ascii=False)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
