"""What the trainer takes from Ultralytics' trainer is listed, method by method, and was read in the version that is installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_compress.train.trainer import HookedTrainer

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/architecture.md"
# Of the source in DetectionTrainer and BaseTrainer. A new digest goes here after the method was read and its row in PAGE is true.
DIGESTS = {
    "__init__": "5862cb7eeabe",
    "_build_train_pipeline": "ed6071c0b7d9",
    "_clear_memory": "89cae84cbf0d",
    "_close_dataloader_mosaic": "ee5b6df05c41",
    "_do_train": "87a635e3bfc4",
    "_get_memory": "91eb41565567",
    "_get_warmup_iterations": "2b8d4260941e",
    "_handle_nan_recovery": "e465d82576a3",
    "_load_checkpoint_state": "1c4472505c34",
    "_model_train": "eedbd6e19aa7",
    "_setup_ddp": "90798e18affb",
    "_setup_scheduler": "2102ad770f8e",
    "_setup_train": "aecd0c111afe",
    "add_callback": "b4ecb2344dac",
    "auto_batch": "31ae2e6c5cf6",
    "build_dataset": "a353cf00f713",
    "build_optimizer": "108f7055e600",
    "check_resume": "8cc8f082c77b",
    "compute_class_weights": "52e0d014fe47",
    "final_eval": "398e74e935f3",
    "get_class_counts": "ad77f7101a44",
    "get_dataloader": "7377e65f4649",
    "get_dataset": "611e9c8ae89f",
    "get_model": "37c702144ea8",
    "get_validator": "3690af5ae030",
    "label_loss_items": "40327b5bc978",
    "on_plot": "24b6fcfc3fb1",
    "optimizer_step": "bec16cbc552a",
    "plot_metrics": "046604f9dfb2",
    "plot_training_labels": "b552ca631f7b",
    "plot_training_samples": "b949803cff57",
    "preprocess_batch": "11a2d4e7be57",
    "progress_string": "7553055b8e6c",
    "read_results_csv": "869330466c9f",
    "resume_training": "a43cef5955c0",
    "run_callbacks": "049f54871151",
    "save_metrics": "aec243b661fc",
    "save_model": "47f61ede98e6",
    "set_callback": "bd9d8f211ea8",
    "set_class_weights": "158cb39a0f09",
    "set_model_attributes": "f17d1652ea37",
    "set_model_names_for_load": "4283a387adc9",
    "setup_model": "33c98eece052",
    "train": "b7f76d34d85c",
    "validate": "e56ca46cb1e3",
}


def source(name: str) -> str:
    return "".join(
        inspect.getsource(vars(kind)[name]) for kind in (DetectionTrainer, BaseTrainer) if name in vars(kind)
    )


def methods() -> list[str]:
    names = [name for name in dir(DetectionTrainer) if name == "__init__" or not name.startswith("__")]
    return [name for name in names if callable(getattr(DetectionTrainer, name))]


def rows() -> dict[str, str]:
    """What is done with each method, from the tables and the two lists."""
    section = (
        (ROOT / PAGE).read_text(encoding="utf-8").partition("### What the trainer takes")[2].partition("\n### ")[0]
    )
    found, kind = {}, ""
    for block in section.split("\n\n"):
        if head := re.match(r"\| (replaced|called|taken|never called) \||(Taken|Never called)[^:]*:", block):
            kind = (head[1] or head[2]).lower()
            names = re.findall(r"^\| `(\w+)`", block, re.MULTILINE) if head[1] else re.findall(r"`(\w+)`", block)
            found |= dict.fromkeys(names, kind)
    return found


def test_no_method_is_new_or_gone() -> None:
    assert sorted(methods()) == sorted(DIGESTS)


@pytest.mark.parametrize("name", DIGESTS)
def test_a_method_is_as_it_was_read(name: str) -> None:
    found = hashlib.sha256(source(name).encode()).hexdigest()[:12]
    assert found == DIGESTS[name], (
        f"DetectionTrainer.{name} has changed: read it, then correct its row in {PAGE} and its digest"
    )


def test_the_table_says_of_each_method_whether_ours_takes_its_place() -> None:
    said = rows()
    assert said.keys() == DIGESTS.keys()
    for name, word in said.items():
        assert (word in ("called", "replaced")) == (name in vars(HookedTrainer)), name
        assert word in ("taken", "called", "replaced", "never called"), name
        own = inspect.getsource(vars(HookedTrainer)[name]) if name in vars(HookedTrainer) else ""
        if word == "called":
            assert "super()." in own, name
        if word == "replaced":
            assert f"super().{name}" not in own or name == "get_dataloader", name


def test_the_version_is_bound_and_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "ultralytics"]
    assert {"<", ">="} <= {part.operator for part in bound.specifier}
    assert importlib.metadata.version("ultralytics") in bound.specifier
