"""What a YOLOv8l is worth as the teacher of a YOLOv8s: both alone, and the YOLOv8s taught, from the same random weights.

    python benchmarks/l_to_s.py --seeds 0 1 2 -- run.threads=1
    python benchmarks/l_to_s.py --terms "shipped:" --terms "features 2: distill.feature_weight=2"

The recipe names the data, the teacher (section `teacher`) and the student (section `baseline`), which is trained alone as the stage
`baseline` does. The taught student has the same epochs, schedule, images and seed, and the losses of the section `distill`. One
teacher, of the recipe's own seed, teaches the students of all seeds. Knobs after `--` are those of every training. Finished trainings
are kept in the store of the current folder, so a killed benchmark continues at its last epoch. Prints a markdown table, and on the
last line JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from yolo_compress import home, run
from yolo_compress.files.atomic import atomic_write
from yolo_compress.preflight import prepare
from yolo_compress.recipe.recipe import DistillConfig, Recipe, TrainConfig, load
from yolo_compress.stages import Job, _load_or_train, distill
from yolo_compress.stages._training import finish
from yolo_compress.stages.metrics import of_model
from yolo_compress.store import environment
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store


def taught(recipe: Recipe, teacher: Artifact, kept: Path) -> float:
    """Return mAP50-95 of the recipe's `baseline`, trained as its section says, with the losses of the section `distill`."""
    assert recipe.distill is not None, "a recipe with a section distill"
    schedule = {name: getattr(recipe.baseline, name) for name in TrainConfig.model_fields}
    section = DistillConfig.model_validate({**recipe.distill.model_dump(), **schedule})
    key = {"config": section.model_dump(mode="json"), "seed": recipe.run.seed, "teacher": teacher.fingerprint}
    folder = (
        kept / fingerprint({**key, "model": recipe.baseline.model, "data": recipe.data.model_dump(mode="json")})[:16]
    )
    result = folder / "result.json"
    if not result.is_file():
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        (folder / "work").mkdir(exist_ok=True)
        recipe, dataset = prepare(recipe, Store(home.weights()))
        job = Job(section, recipe, dataset, {"teacher": teacher}, folder / "out", folder / "work")
        student = _load_or_train.start(recipe.baseline, dataset, recipe.run.seed, "baseline")
        trained, _ = distill.taught(job, student, f"taught, seed {recipe.run.seed}")
        atomic_write(result, json.dumps({"key": key, "map50_95": finish(job, trained)["map50_95"]}) + "\n")
    return float(json.loads(result.read_text())["map50_95"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-l-to-s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--terms", action="append", help="NAME: distill.knob=value ...; default: the recipe's")
    parser.add_argument("overrides", nargs="*", help="section.key=value of every training; give them after --")
    options = parser.parse_args()

    def with_knobs(*knobs: str) -> Recipe:
        pairs = [(key, value) for key, _, value in (text.partition("=") for text in (*options.overrides, *knobs))]
        return load(options.recipe, pairs)

    teacher = run(with_knobs(), "teacher")
    kept = home.weights() / "benchmarks/l_to_s"
    rows: dict[str, dict[int, float]] = {"alone": {}}
    for seed in options.seeds:
        rows["alone"][seed] = of_model(run(with_knobs(f"run.seed={seed}"), "baseline"))["map50_95"]
        for terms in options.terms or ["taught:"]:
            name, _, knobs = terms.partition(":")
            rows.setdefault(name, {})[seed] = taught(with_knobs(f"run.seed={seed}", *knobs.split()), teacher, kept)
    best = of_model(teacher)["map50_95"]
    print("| student | mAP50-95 | gain | share of the gap | gain of each seed |\n|---|---|---|---|---|")
    answer: list[dict[str, Any]] = []
    for name, found in rows.items():
        gains = [found[seed] - rows["alone"][seed] for seed in found]
        gap = best - statistics.mean(rows["alone"].values())
        mean, gain = statistics.mean(found.values()), statistics.mean(gains)
        each = ", ".join(f"{one:+.4f}" for one in gains)
        print(f"| {name} | {mean:.4f} | {gain:+.4f} | {f'{gain / gap:.0%}' if gap > 0 else 'no gap'} | {each} |")
        answer.append({"student": name, "map50_95": found, "gains": gains})
    print(f"\nteacher: {best:.4f}")
    settings = {**vars(options), "teacher": best}
    print(json.dumps({"settings": settings, "rows": answer, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
