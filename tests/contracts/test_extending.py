"""Extensions: a family of detectors, a criterion or a feature loss needs one file or function, and one row in a table."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from tests.support.pages import blocks
from tests.support.quant_net import NAMES, images, run_onnx, run_torch
from yolo_compress.distill import feature
from yolo_compress.errors import RecipeError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.export.torchscript import export_int8_torchscript
from yolo_compress.nets import families
from yolo_compress.nets.conv import check_conv
from yolo_compress.nets.family import Layer
from yolo_compress.nets.flow import FeatureMap, Flow
from yolo_compress.nets.yolov8 import YOLOV8
from yolo_compress.prune import criteria
from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes
from yolo_compress.prune.criteria import scores
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach, detach
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import fold
from yolo_compress.recipe import choices

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, PAGE = ROOT / "yolo_compress", ROOT / "docs/extending.md"

# --- a family -----------------------------------------------------------------------------------------------------------

BLOCKS = {"C2f", "C3k", "C3k2", "C2PSA", "PSABlock", "Attention", "SPPF", "Bottleneck", "DFL", "Detect", "DWConv"}
WIRING = {"cv1", "cv2", "cv3", "dfl"}  # attributes of blocks and head
IN_TEXT = re.compile(r"\.cv\d|\bdfl\b|\bC2f\b")
NAMES_FOR_PEOPLE = {
    "recipe/sections.py": "model.2.cv1 as an example in help",
}


def wiring_in(source: str) -> set[str]:
    """Return the names of blocks and their attributes in a module's identifiers, attributes and strings, without docstrings."""
    tree, found = ast.parse(source), set[str]()
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        names = {
            ast.Import: lambda n: [alias.name for alias in n.names],
            ast.ImportFrom: lambda n: [n.module or "", *(alias.name for alias in n.names)],
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
        }.get(type(node), lambda n: [])(node)
        found |= {name for name in names if name in BLOCKS or name.startswith("ultralytics.nn.modules")}
        if isinstance(node, ast.Attribute) and node.attr in WIRING:
            found.add(f".{node.attr}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found |= {node.value} & BLOCKS | set(IN_TEXT.findall(node.value))
    return found


def test_wiring_in_finds_every_form() -> None:
    source = '"""C2f"""\nfrom ultralytics.nn.modules import C2f\nhead.cv2\nx = f"{name}.cv1"\nif kind == "Detect": pass\nimport cv2'
    assert wiring_in(source) == {"ultralytics.nn.modules", "C2f", ".cv2", ".cv1", "Detect"}


def test_only_nets_knows_blocks_and_their_wiring() -> None:
    found = {
        file.relative_to(PACKAGE).as_posix(): wiring
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.parent != PACKAGE / "nets" and (wiring := wiring_in(file.read_text(encoding="utf-8")))
    }
    assert {name: wiring for name, wiring in found.items() if name not in NAMES_FOR_PEOPLE} == {}
    assert found.keys() >= NAMES_FOR_PEOPLE.keys(), "an exception that is not needed any more"


class Shortcut(nn.Module):
    """A shortcut over two convolutions, with other names than in YOLOv8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.into, self.out = Conv(channels, channels, 3), Conv(channels, channels, 3)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW + self.out(self.into(x_BCHW))


class Twin(nn.Module):
    """A layer of a new family: a shortcut and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.short, self.last = Shortcut(channels), Conv(channels, channels, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.last(self.short(x_BCHW))


def check_twin(name: str, layer: Twin) -> None:
    check_conv(f"{name}.short.into", layer.short.into)
    check_conv(f"{name}.short.out", layer.short.out)
    check_conv(f"{name}.last", layer.last)


def wire_twin(flow: Flow, name: str, layer: Twin, sources: list[FeatureMap]) -> FeatureMap:
    return flow.conv(f"{name}.last", flow.shortcut(f"{name}.short", sources[0], "into", "out"))


TWINS = replace(
    YOLOV8,
    name="Twins",
    made_of="twins",
    layers={Conv: YOLOV8.layers[Conv], Twin: Layer(check_twin, wire_twin), YOLOV8.head: YOLOV8.layers[YOLOV8.head]},
)
YAML = {
    "nc": len(NAMES),
    "scales": {"n": [1.0, 1.0, 1024]},
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 1]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [[[2, 3], 1, "Detect", ["nc"]]],
}  # fmt: skip


def twins() -> nn.Module:
    """Make a detector of strides 4 and 8 whose third layer is a `Twin`. Its BatchNorms have random weights and fit random images."""
    torch.manual_seed(0)
    model = DetectionModel(YAML, verbose=False)
    twin = Twin(16)
    for name in ("i", "f", "type", "np"):
        setattr(twin, name, getattr(model.model[2], name))
    model.model[2] = twin
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(8))
    return model.eval()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(families.FAMILIES, "twins", TWINS)
    yield


def test_a_family_that_is_not_registered_is_an_error_with_the_name_of_its_block() -> None:
    for what in (prunable, plan):
        with pytest.raises(RecipeError, match=r"model\.2 is a Twin; supported are YOLOv8 detection models"):
            what(twins())


@pytest.mark.usefixtures("registered")
def test_a_registered_family_is_planned_and_pruned() -> None:
    model = twins()
    groups = {group.name: group for group in prunable(model)}
    tied = {member.module for member in groups["model.1"].having("out")}
    assert tied == {"model.1.conv", "model.2.short.out.conv"}, "the shortcut ties what it adds"
    assert groups["model.2.short.into"].width == 16
    keep = {"model.1": torch.arange(0, 16, 2), "model.2.short.into": torch.arange(4)}
    silenced = twins()
    with torch.no_grad():
        for name, stays in keep.items():
            gone = torch.ones(16, dtype=torch.bool)
            gone[stays] = False
            for member in groups[name].having("norm"):
                norm = silenced.get_submodule(member.module)
                norm.weight[gone], norm.bias[gone] = 0, 0
        prune(model, keep)
    assert model.model[2].short.into.conv.weight.shape[:2] == (4, 8)
    assert model.model[2].np == sum(parameter.numel() for parameter in model.model[2].parameters())
    difference = run_torch(model.double(), images(2).double()) - run_torch(silenced.double(), images(2).double())
    assert abs(difference).max() < 1e-9


@pytest.mark.usefixtures("registered")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_registered_family_is_quantised_and_exported(tmp_path: Path) -> None:
    model, batch = twins(), images(1)
    placed = plan(model)
    together = placed.group_of("model.2.short").tensors
    assert together == ("model.1", "model.2.short.out", "model.2.short"), "what meets in a sum has one scale"
    stock = [(name, type(module)) for name, module in model.named_modules()]
    floats = run_torch(model, batch)
    state = ptq(model, lambda: [images(8)])
    attach(model, state)
    rounded = run_torch(model, batch)
    detach(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == stock
    folded = fold(state, model)
    export_onnx(model, tmp_path / "fp32.onnx", (64, 64), names=NAMES)
    assert abs(run_onnx(tmp_path / "fp32.onnx", batch) - floats).max() < 1e-3
    counts = insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", folded, "tensorrt10")
    assert counts.convs == len(placed.convs) == 14
    export_int8_torchscript(model, tmp_path / "int8.torchscript", (64, 64), folded, names=NAMES)
    error = abs(rounded - floats).mean()
    assert error > 0
    assert abs(run_onnx(tmp_path / "int8.onnx", batch) - rounded).mean() < 0.1 * error
    script = torch.jit.load(tmp_path / "int8.torchscript")(batch).numpy()
    assert abs(script - floats).mean() < 2 * error, "it rounds the outputs of convolutions, too"


# --- a criterion, a feature loss ----------------------------------------------------------------------------------------

OWN = """import torch


def last_first(evidence, group):
    return torch.arange(group.width, 0, -1.0)


def absolute(student_BCHW, teacher_BCHW, weight_B1HW):
    return (student_BCHW - teacher_BCHW).abs().mean()
"""
WITH_ROWS = """
from yolo_compress.recipe import choices
choices.CRITERIA["last_first"] = choices.Choice("own_of_a_test:last_first", "the last channel goes first")
choices.FEATURE_LOSSES["absolute"] = choices.Choice("own_of_a_test:absolute", "absolute difference")
from yolo_compress.cli.main import main
from yolo_compress.recipe import recipe
loaded = recipe.load("digits", [("prune.criterion", "last_first"), ("distill.feature_loss", "absolute")])
print(loaded.prune.criterion, loaded.distill.feature_loss)
for verb in ("prune", "distill"):
    main(["help", verb])
main(["cfg", "recipe=digits", "prune.criterion=another"])
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module with a criterion and a feature loss, which can be imported by its name."""
    (tmp_path / "own_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(choices.CRITERIA, "last_first", choices.Choice("own_of_a_test:last_first", "a test's"))
    monkeypatch.setitem(choices.FEATURE_LOSSES, "absolute", choices.Choice("own_of_a_test:absolute", "a test's"))
    yield tmp_path
    sys.modules.pop("own_of_a_test", None)


def test_a_row_is_a_value_of_the_knob_and_is_in_the_help(own: Path) -> None:
    """Run in another process, like a user who adds the row to the file."""
    path = os.pathsep.join([str(PACKAGE.parent), str(own)])
    done = subprocess.run(
        [sys.executable, "-c", WITH_ROWS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    stdout = " ".join(done.stdout.split())
    assert stdout.startswith("last_first absolute"), done.stderr
    assert "activation, random, last_first, or file.py:function" in stdout
    assert "attention, relation, absolute, or file.py:function" in stdout
    own_function = "file.py:function: a function of your own."
    assert f"for comparison. last_first: the last channel goes first. {own_function}" in stdout
    assert f"1907.09682). absolute: absolute difference. {own_function}" in stdout
    assert "got 'another', expected one of obs, bn_gamma" in done.stderr and "random, last_first, or" in done.stderr


@pytest.mark.usefixtures("registered")
def test_a_criterion_of_a_row_or_a_file_chooses_the_channels(own: Path) -> None:
    for name in ("last_first", f"{own}/own_of_a_test.py:last_first"):
        model = twins()
        groups, shapes = prunable(model), conv_shapes(model, (64, 64))
        importance = scores(Evidence(model, groups), criteria.find(name))
        keep = choose(model, groups, importance, keep_flops(shapes, 0.5), 1, shapes).keep
        assert any(len(stays) < group.width for group in groups for stays in [keep.get(group.name, ())])
        assert all(stays.tolist() == list(range(len(stays))) for stays in keep.values()), "the first channels stay"
        prune(model, keep)
        assert conv_macs(model, (64, 64)) < 0.55 * conv_macs(twins(), (64, 64))


def test_a_feature_loss_of_a_row_and_one_of_a_file_are_the_same_term(own: Path) -> None:
    student, teacher, weight = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    expected = float((student - teacher).abs().mean())
    for name in ("absolute", f"{own}/own_of_a_test.py:absolute"):
        loss = feature.find(name)
        assert float(loss.distance(student, teacher, weight)) == pytest.approx(expected)
        assert isinstance(loss.adapter(3, 3), feature.Aligner)


@pytest.mark.parametrize("row", [*choices.CRITERIA.items(), *choices.FEATURE_LOSSES.items()], ids=lambda row: row[0])
def test_every_row_leads_to_its_function(row: tuple[str, choices.Choice]) -> None:
    find = criteria.find if row[0] in choices.CRITERIA else feature.find
    assert find(row[0])


# --- the page -----------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, loss, family = (block.text for block in blocks(PAGE, "python")[:3])
    (tmp_path / "mine.py").write_text(criterion + "\n\n" + loss)
    said: dict[str, Any] = {}
    exec(family, said)
    monkeypatch.setitem(families.FAMILIES, "twins", replace(TWINS, layers={**TWINS.layers, Twin: said["TWIN"]}))
    model = twins()
    groups = {group.name: group for group in prunable(model)}
    assert plan(model).group_of("model.2.short").joins == ("model.2.short (sum)",)
    got = criteria.find(f"{tmp_path}/mine.py:spread")(Evidence(model, list(groups.values())), groups["model.0"])
    assert torch.allclose(got, model.model[0].conv.weight.detach().flatten(1).std(1))
    taken = feature.find(f"{tmp_path}/mine.py:absolute")
    student, teacher, weight = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    weight[:, :, 1] = 1.0
    expected = (student - teacher).abs()[:, :, 1].mean()
    assert torch.allclose(taken.distance(student, teacher, weight), expected)
