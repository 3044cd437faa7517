"""What distillation costs and what it is worth, in three commands.

    python benchmarks/distillation.py steps --data bccd.yaml --weights yolov8n_bccd.pt --imgsz 320 --rounds 6
    python benchmarks/distillation.py gain prune.epochs=0 distill.epochs=10 --recipe bccd --seeds 0 1 2
    python benchmarks/distillation.py aligners --student weights/bccd/prune/model.pt --teacher yolov8n_bccd.pt

`steps`: time of a training step with feature and class terms, the teacher as large as the student, against a plain step of
ours; and Ultralytics' own distillation (`distill_model`) against a plain step of theirs; the four in turn, in one run. A step
is measured as in `trainer_overhead.py`.

`gain`: each term alone, and each kind of teacher, against the same training without any, from the same pruned net, on the same
images in the same order (pairs share a seed). Feature losses are of different magnitudes: each has a weight that makes it 2 to
8 % of the total loss in the first epoch after a cut, on BCCD. Finished runs are kept in `--work` and not done again, a killed one
continues at its last epoch.

`aligners`: how far a student's maps are from the teacher's through an aligner that is the identity, and through one that was
started on one batch (`distill/feature.py`), on images that it did not see, as a share of the variance of the teacher's map.

All print a markdown table and, on the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trainer_overhead import copy_for_ultralytics, ours, theirs

from yolo_compress import home, run
from yolo_compress.chain import provider
from yolo_compress.data.dataset import load as load_data
from yolo_compress.distill.feature import Aligner
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.taps import Taps, split_pairs
from yolo_compress.distill.teacher import Frozen
from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.nets import detect
from yolo_compress.preflight import prepare
from yolo_compress.recipe.recipe import DistillConfig, TrainConfig, load
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.stages import Job, distill
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.stages._training import finish, fit
from yolo_compress.store import environment
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.source_weights import find_weights
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint
from yolo_compress.train.settings import TrainSettings

# --- steps ----------------------------------------------------------------------------------------------------------

PAIRS = {"ours": ("ours, distilled", "ours, plain"), "ultralytics": ("ultralytics, distilled", "ultralytics, plain")}


def steps(args: argparse.Namespace) -> None:
    dataset, weights = load_data(args.data, limit_train=args.limit_train), find_weights(args.weights)
    settings = TrainSettings(
        epochs=1, batch=args.batch, imgsz_px=args.imgsz, optimizer="AdamW", lr0=1e-3, threads=args.threads, amp=False
    )
    seconds: dict[str, list[list[float]]] = {who: [] for pair in PAIRS.values() for who in pair}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = copy_for_ultralytics(dataset, folder / "data")

        def teach() -> Teach:
            teacher = checkpoint.load_model(weights)
            with torch.no_grad():  # a teacher that equals its student is run slower, so that both round alike
                for parameter in teacher.parameters():
                    parameter.mul_(1 + 1e-3)
            return Teach(Frozen(teacher), feature_weight=0.3, class_weight=0.25, temperature=2.0)

        todo: dict[str, Callable[[Path], list[float]]] = {
            "ours, distilled": lambda work: ours(dataset, settings, weights, work, [teach()]),
            "ours, plain": lambda work: ours(dataset, settings, weights, work),
            "ultralytics, distilled": lambda work: theirs(data, settings, weights, work, distill_model=str(weights)),
            "ultralytics, plain": lambda work: theirs(data, settings, weights, work),
        }
        for number in range(args.rounds):
            for place, who in enumerate(todo if number % 2 == 0 else reversed(todo)):
                seconds[who].append(todo[who](folder / f"{number}-{place}"))
    medians = {who: statistics.median(step for steps in runs for step in steps) for who, runs in seconds.items()}
    print("| trainer | median step ms | n |\n|---|---|---|")
    for who, value in medians.items():
        print(f"| {who} | {1e3 * value:.1f} | {sum(map(len, seconds[who]))} |")
    answer: dict[str, Any] = {}
    for whose, (with_it, without) in PAIRS.items():
        by_round = [
            statistics.median(a) / statistics.median(b) for a, b in zip(seconds[with_it], seconds[without], strict=True)
        ]
        answer[whose] = {
            "ratio_of_medians": round(medians[with_it] / medians[without], 4),
            "ratio_by_round": [round(value, 4) for value in by_round],
        }
    print(json.dumps({"ratios": answer, "settings": settings_of(args), "environment": environment.describe()}))


# --- gain -----------------------------------------------------------------------------------------------------------

# The section `distill` that the recipe `bccd` had. Knobs on the command line replace it.
SECTION = [
    ("distill.epochs", "12"),
    ("distill.batch", "8"),
    ("distill.lr0", "0.0005"),
    ("distill.mosaic", "0.5"),
    ("distill.close_mosaic", "4"),
    ("distill.flipud", "0.5"),
    ("distill.temperature", "1.0"),
    ("distill.box_weight", "3.0"),
]
NO_HEAD = {"logit_weight": 0.0, "box_weight": 0.0, "iou_weight": 0.0}
FEATURES = {
    "weighted_l2": 0.3,
    "fitnet": 0.45,
    "cwd": 1.2,
    "pkd": 0.2,
    "mgd": 0.7,
    "attention": 1.2,
    "relation": 80.0,
}
ROWS: dict[str, dict[str, Any]] = {
    "as in SECTION": {},
    "class alone": {"feature_weight": 0.0, "box_weight": 0.0, "iou_weight": 0.0},
    "box alone": {"feature_weight": 0.0, "logit_weight": 0.0, "iou_weight": 0.0},
    "iou alone": {"feature_weight": 0.0, "logit_weight": 0.0, "box_weight": 0.0, "iou_weight": 2.5},
    **{f"{loss} alone": {**NO_HEAD, "feature_loss": loss, "feature_weight": w} for loss, w in FEATURES.items()},
    "PP-YOLOE's weights": {"feature_weight": 0.0, "logit_weight": 1.0, "iou_weight": 2.5, "box_weight": 0.5},
    "mutual": {"teacher": "mutual"},
    "self": {"teacher": "self"},
    "data-free": {},  # as `--data-free` says
}


def gain(args: argparse.Namespace) -> None:
    overrides = [(key, value) for key, _, value in (text.partition("=") for text in args.overrides)]
    rows = {name: ROWS[name] for name in args.rows or ROWS}
    if "data-free" in rows:
        rows["data-free"] = dict(zip(("data_free", "data_free_steps"), args.data_free, strict=True))
    results: dict[str, dict[int, float]] = {name: {} for name in ("no distillation", *rows)}
    for seed in args.seeds:
        recipe = load(args.recipe, [*SECTION, *overrides, ("run.seed", str(seed))])
        assert recipe.distill is not None
        results["no distillation"][seed] = measured(recipe, None, args.work)
        for name, changes in rows.items():
            results[name][seed] = measured(recipe, with_changes(recipe.distill, changes), args.work)
    base = results["no distillation"]
    print("| distilled with | mAP50-95 | gain | each seed |\n|---|---|---|---|")
    table = []
    for name, by_seed in results.items():
        gains = [value - base[seed] for seed, value in by_seed.items()]
        mean, lift = statistics.mean(by_seed.values()), statistics.mean(gains)
        print(f"| {name} | {mean:.4f} | {lift:+.4f} | {', '.join(f'{one:+.4f}' for one in gains)} |", flush=True)
        table.append({"row": name, "changes": rows.get(name), "map50_95": by_seed, "gain": lift, "gains": gains})
    print(json.dumps({"rows": table, "settings": settings_of(args), "environment": environment.describe()}))


def with_changes(config: DistillConfig, changes: dict[str, Any]) -> DistillConfig:
    """The recipe's section with the changes of a row, and without the knobs that its kind of teacher does not read."""
    idle = config.idle(changes.get("teacher", config.teacher))
    if "data_free" in changes:
        idle = [*idle, "alpha"]
    known = {name: value for name, value in config.model_dump().items() if name not in idle}
    return DistillConfig.model_validate(known | changes)


def measured(recipe: Any, config: DistillConfig | None, kept: Path) -> float:
    """mAP50-95 of the recipe's pruned net after the epochs of the section distill, as `config` says or without a teacher."""
    inputs = {"prune": run(recipe, "prune"), "teacher": run(recipe, provider(recipe, "teacher"))}
    section = config or recipe.distill
    # an untaught net is the same whatever would have taught it
    read = None if config else set(TrainConfig.model_fields)
    settings = section.model_dump(mode="json", include=read)
    key = {"config": settings, "taught": config is not None, "seed": recipe.run.seed}
    key["inputs"] = {name: artifact.fingerprint for name, artifact in inputs.items()}
    key["cpu"] = cpu_model()  # which says in what precision it trains
    folder = kept / fingerprint(key)[:16]
    done = folder / "result.json"
    if not done.is_file():
        for part in ("out", "work"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "out")
        (folder / "out").mkdir()
        recipe, dataset = prepare(recipe, Store(home.weights()))
        job = Job(section, recipe, dataset, inputs, folder / "out", folder / "work")
        metrics = distill.run(job) if config else untaught(job)
        atomic_write(done, json.dumps({"key": key, "metrics": metrics}) + "\n")
    with storage_errors(done, "read"):
        return float(json.loads(done.read_text())["metrics"]["map50_95"])


def untaught(job: Job) -> dict[str, Any]:
    return finish(job, fit(job, checkpoint.load_model(job.inputs["prune"].file("model.pt")), [], "plain"))


# --- aligners -------------------------------------------------------------------------------------------------------


def aligners(args: argparse.Namespace) -> None:
    dataset, size = load_data(args.data), (args.imgsz, args.imgsz)
    student, teacher = (
        checkpoint.load_model(args.student).eval(),
        checkpoint.load_model(find_weights(args.teacher)).eval(),
    )
    samples = dataset.train[: 2 * args.batch]
    seen, unseen = (torch.cat(list(letterboxed(part, size))) for part in (samples[: args.batch], samples[args.batch :]))
    pairs = split_pairs(args.layers) if args.layers else [(name, name) for name in detect.inputs(student)]
    first, second = (maps_of(student, teacher, pairs, images_BCHW) for images_BCHW in (seen, unseen))
    rows = []
    print("| layer | channels | identity | started |\n|---|---|---|---|")
    for (name, _), (own, other), (new_own, new_other) in zip(pairs, first, second, strict=True):
        aligner = Aligner(own.shape[1], other.shape[1])
        variance = (new_other - new_other.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
        off = []
        for start in (False, True):
            if start:
                aligner.start(own, other)
            with torch.no_grad():
                off.append(float((aligner(new_own) - new_other).square().mean() / variance))
        print(f"| {name} | {own.shape[1]} to {other.shape[1]} | {off[0]:.2f} | {off[1]:.2f} |")
        rows.append({"layer": name, "identity": off[0], "started": off[1]})
    print(json.dumps({"rows": rows, "settings": settings_of(args), "environment": environment.describe()}))


def maps_of(
    student: torch.nn.Module, teacher: torch.nn.Module, pairs: list[tuple[str, str]], images_BCHW: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(student's, teacher's) map of each pair of layers."""
    found = []
    for net, names in ((student, [mine for mine, _ in pairs]), (teacher, [yours for _, yours in pairs])):
        taps = Taps(names)
        taps.attach(net)
        with torch.no_grad():
            net(images_BCHW)
        found.append(taps.take())
        taps.remove()
    return list(zip(*found, strict=True))


# --- command line ---------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "call"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    cost = commands.add_parser("steps")
    cost.set_defaults(call=steps)
    cost.add_argument("--data", default="bccd.yaml")
    cost.add_argument("--weights", default="yolov8n_bccd.pt")
    cost.add_argument("--imgsz", type=int, default=320)
    cost.add_argument("--batch", type=int, default=16)
    cost.add_argument("--rounds", type=int, default=6)
    cost.add_argument("--threads", type=int, default=2)
    cost.add_argument("--limit-train", type=int, help="training images")
    worth = commands.add_parser("gain")
    worth.set_defaults(call=gain)
    worth.add_argument("--recipe", default="bccd")
    worth.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    worth.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    worth.add_argument("--data-free", type=int, nargs=2, default=[64, 300], metavar=("IMAGES", "STEPS"))
    worth.add_argument("--work", type=Path, default=Path("weights/benchmarks/distillation"))
    worth.add_argument("overrides", nargs="*", help="section.key=value for every run; give them before the options")
    fit = commands.add_parser("aligners")
    fit.set_defaults(call=aligners)
    fit.add_argument("--student", type=Path, required=True)
    fit.add_argument("--teacher", default="yolov8n_bccd.pt")
    fit.add_argument("--data", default="bccd.yaml")
    fit.add_argument("--imgsz", type=int, default=320)
    fit.add_argument("--batch", type=int, default=8)
    fit.add_argument("--layers", nargs="+", help="as distill.layers; default: the maps that enter Detect")
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
