"""The plan, fake quantisation, its state and the QAT hook. Fake quantisation equals the formula."""

from __future__ import annotations

import io
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import Attention
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from tests.support.quant_net import images, net
from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, NumericsError, RecipeError
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import FakeQuant, QuantisedOutput, QuantisedSum, attach, detach, read
from yolo_compress.quant.learned import LearnedRange
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import AMAX_FLOOR, QuantState, fold


def ranges(model: nn.Module) -> QuantState:
    return ptq(model, lambda: [images(4)], "max", weight_bits=8)


@pytest.fixture(scope="module")
def state() -> QuantState:
    return ranges(net())


def quantised(x: Tensor, amax: Tensor, low: int) -> Tensor:
    return (x * 127 / amax).round().clamp(low, 127) * amax / 127


def codes(weight: Tensor, amax_C: tuple[float, ...]) -> Tensor:
    """INT8 values of a weight, as float64."""
    return (weight.detach().double() * 127 / torch.tensor(amax_C, dtype=torch.float64).view(-1, 1, 1, 1)).round()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(2, seed=5))[0]


@pytest.mark.fault(40)
def test_plan_is_all_but_the_output_convolutions_and_dfl() -> None:
    model = net()
    macs: dict[str, int] = {}

    def count(name: str) -> None:
        def hook(conv: nn.Conv2d, args: tuple[Tensor], made: Tensor) -> None:
            macs[name] = made[0].numel() * conv.weight[0].numel()

        model.get_submodule(name).register_forward_hook(hook)

    placed = plan(model)
    skipped = dict(placed.skipped)
    for name in (*placed.convs, *skipped):
        count(name)
    output(model)
    assert set(skipped) == {f"model.22.cv{b}.{i}.2" for b in (2, 3) for i in range(3)} | {"model.22.dfl.conv"}
    assert all(skipped.values())
    assert len(placed.convs) + len(skipped) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 64
    assert sum(macs[name] for name in placed.convs) >= 0.95 * sum(macs.values())


def test_only_tensors_that_are_joined_share_a_scale() -> None:
    """The groups of YOLOv8n, written down by hand from its yaml."""
    groups = {group.name: set(group.tensors) for group in plan(net()).int8}
    several = {name: tensors for name, tensors in groups.items() if len(tensors) > 1}

    def c2f(block: int, sums: int) -> set[str]:
        name = f"model.{block}"
        return {f"{name}.cv1", f"{name}.m.0.cv2"} | {
            f"{name}.m.{i}{part}" for i in range(sums) for part in ("", ".cv2")
        }

    expected = [c2f(2, 1), c2f(4, 2), c2f(6, 2), c2f(8, 1), *(c2f(block, 0) for block in (12, 15, 18, 21))]
    expected.append({"model.4.cv2", "model.12.cv2", "model.16"})  # concats 14 (after the upsampling) and 17
    expected.append({"model.6.cv2", "model.9.cv2", "model.19"})  # concats 11 and 20
    assert sorted(map(sorted, several.values())) == sorted(map(sorted, expected))
    assert sum(map(len, groups.values())) == 1 + 57 - 6 + 6  # the image, every block but those before outputs, the sums


@pytest.mark.parametrize(
    ("size", "sums", "concats"),
    [
        ("v8n", 6, 13), ("v8s", 6, 13), ("v8m", 12, 13), ("v8l", 18, 13), ("v8x", 18, 13),
        ("v8n-p2", 6, 17), ("v8n-p6", 7, 18),
        ("11n", 13, 17), ("11s", 13, 17), ("11m", 18, 22), ("11l", 36, 30), ("11x", 36, 30),
    ],
)  # fmt: skip
def test_every_sum_and_concatenation_of_every_size_is_int8(size: str, sums: int, concats: int) -> None:
    config = yaml_model_load(f"yolo{size}.yaml")
    config["scales"][size[2]][1] = 0.0625  # narrow: the widths do not matter here
    model = DetectionModel(config, nc=3, verbose=False)
    placed = plan(model)
    joins = [where for group in placed.int8 for where in group.joins]
    assert sum(where.endswith("(sum)") for where in joins) == sums
    assert sum(not where.endswith("(sum)") for where in joins) == concats  # C2f, C3k, C2PSA, SPPF and neck
    floats = 1 + 2 * len(model.stride) + 2 * sum(isinstance(module, Attention) for module in model.modules())
    assert len(placed.convs) == sum(isinstance(module, nn.Conv2d) for module in model.modules()) - floats
    assert all(why for _, _, _, why in placed.rows())


def test_a_group_left_in_float_takes_its_convolutions_with_it() -> None:
    model = net()
    whole, part = plan(model), plan(model, left=["model.4.cv2"])
    readers = {"model.5.conv", "model.15.cv1.conv", "model.18.cv1.conv"}
    assert set(whole.convs) - set(part.convs) == readers
    assert set(whole.tensors) - set(part.tensors) == {"model.4.cv2", "model.12.cv2", "model.16"}
    with pytest.raises(RecipeError, match=r"model\.99"):
        plan(model, left=["model.99"])
    with pytest.raises(RecipeError, match="nothing to quantise"):
        plan(model, left=[group.name for group in whole.int8])


@pytest.mark.parametrize("name", ["images", "model.0", "model.2.m.0"])
def test_what_is_left_in_float_is_read_back_as_that(state: QuantState, name: str) -> None:
    model = net()
    less = state.without(group for group in plan(model).groups if name in group.tensors)
    attach(model, less)
    held = read(model)
    assert held.activations.keys() == less.activations.keys() and set(held.convs) == set(less.convs)
    assert name not in held.activations and name in state.activations


def test_a_block_of_another_family_is_named() -> None:
    model = DetectionModel("yolo12n.yaml", nc=3, verbose=False)
    with pytest.raises(RecipeError, match=r"model\.6 is a A2C2f"):
        plan(model)


@pytest.mark.parametrize("name", ["model.3", "model.2.cv1", "model.9.cv1"])
def test_attached_block_follows_the_formula(state: QuantState, name: str) -> None:
    model = net()
    block, stock = model.get_submodule(name), net().get_submodule(name)
    x = torch.randn(2, block.conv.in_channels, 8, 8)
    attach(model, state)
    stock.conv.weight.data = quantised(
        stock.conv.weight.data, torch.tensor(state.weights[f"{name}.conv"]).view(-1, 1, 1, 1), -127
    )
    amax = state.activations[name]
    with torch.no_grad():
        got, before = block(x), stock(x)
    expected = quantised(before, torch.tensor(amax), -128)
    assert (got - expected).abs().max() <= 1.001 * amax / 127  # one INT8 step: a rounding tie
    assert ((got - expected).abs() > 1e-4 * amax).float().mean() < 1e-3
    assert got.unique().numel() <= 256


def test_our_rounding_is_modelopts(state: QuantState) -> None:
    model = net()
    attach(model, replace(state, weight_bits=7))
    quantizer, weights = model.model[1].act.quantizer, model.model[1].conv.weight_quantizer
    x = torch.randn(1000) * state.activations["model.1"]
    weight = model.model[1].conv._parameters["weight"]
    ours = quantizer(x), weights(weight), quantizer(x.bfloat16())
    quantizer.backend = weights.backend = None
    theirs = quantizer(x), weights(weight), quantizer(x.bfloat16())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


def test_attached_sum_and_image_follow_the_formula(state: QuantState) -> None:
    model = net()
    attach(model, state)
    bottleneck = model.model[2].m[0]
    x = torch.randn(2, bottleneck.cv1.conv.in_channels, 8, 8)
    seen: list[Tensor] = []
    model.model[0].conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        expected = quantised(
            x + bottleneck.cv2(bottleneck.cv1(x)), torch.tensor(state.activations["model.2.m.0"]), -128
        )
        assert torch.allclose(bottleneck(x), expected, atol=1e-5)
        image = images(1)
        codes_ = model.model[0].conv.input_quantizer(image)
    assert torch.allclose(codes_, quantised(image, torch.tensor(state.activations["images"]), -128), atol=1e-6)


def test_tensors_of_a_group_hold_one_quantiser_and_no_others_do(state: QuantState) -> None:
    model = net()
    attach(model, state)
    for copied in (model, deepcopy(model)):
        holders: dict[int, set[str]] = {}
        for name, module in copied.named_modules(remove_duplicate=False):
            if isinstance(module, (QuantisedOutput, QuantisedSum)):
                holders.setdefault(id(module.quantizer), set()).add(name.removesuffix(".act"))
        expected = [set(group.tensors) for group in plan(net()).int8 if group.name != "images"]
        assert sorted(map(sorted, holders.values())) == sorted(map(sorted, expected))


def test_detach_gives_back_the_stock_model(state: QuantState) -> None:
    model = net()
    expected, kinds = output(model), [type(module) for module in model.modules()]
    attach(model, state)
    assert read(model) == replace(state, outputs={}, method="")
    assert (output(model) - expected).abs().max() > 0.01  # it did quantise
    detach(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(output(model), expected)
    assert list(model.state_dict()) == list(net().state_dict())
    torch.save(model, io.BytesIO())  # a module of run-time classes cannot be pickled
    with pytest.raises(CorruptArtifact, match="attach"):
        read(model)


def test_deepcopy_and_strict_state_dict(state: QuantState) -> None:
    model = net()
    attach(model, state)
    copied, other = deepcopy(model), net(seed=1)
    attach(other, ranges(net(seed=1)))
    assert torch.equal(output(copied), output(model))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(other), output(model)) and read(other) == read(model)
    detach(copied)
    assert read(model).activations == state.activations  # a copy of its own


def test_gradients_pass_straight_through(state: QuantState) -> None:
    model = net()
    attach(model, state)
    quantizer, amax = model.model[1].act.quantizer, state.activations["model.1"]
    x = torch.linspace(-1.2 * amax, 1.2 * amax, 99, requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(99))
    model.train()
    predictions = model(images(2))
    (predictions["boxes"].square().mean() + predictions["scores"].square().mean()).backward()
    for name in state.convs:
        gradient = model.get_submodule(name)._parameters["weight"].grad
        assert gradient is not None and bool(torch.isfinite(gradient).all()) and gradient.abs().max() > 0, name


def test_folding_changes_only_signs_of_int8_values(state: QuantState) -> None:
    """With gammas of both signs, INT8 values change only their sign. Ultralytics' own fold gives the same ranges.

    The test compares INT8 values, not model outputs: there rounding ties depend on the number of threads, and later layers
    amplify them.
    """
    model = net()
    folded_state = fold(state, model)
    assert folded_state.folded and folded_state.activations == state.activations
    attached = deepcopy(model)
    attach(attached, state)
    folded = deepcopy(model).fuse(verbose=False)
    for name in state.convs:
        before = codes(model.get_submodule(name).weight, state.weights[name])
        after = codes(folded.get_submodule(name).weight, folded_state.weights[name])
        signs = model.get_submodule(name.removesuffix(".conv")).bn.weight.detach().sign().view(-1, 1, 1, 1)
        moved = (after - signs * before).abs()
        assert moved.max() <= 1 and moved.count_nonzero() <= 1e-4 * moved.numel(), name  # float32 rounding ties
    ultralytics = read(attached.fuse(verbose=False))
    for name in state.convs:
        assert ultralytics.weights[name] == pytest.approx(folded_state.weights[name], rel=1e-5), name
    with pytest.raises(CorruptArtifact, match="already folded in"):
        fold(folded_state, folded)


def test_channel_with_gamma_zero_keeps_a_scale() -> None:
    model = net()
    model.model[2].cv1.bn.weight.data[3] = 0.0
    folded = fold(ranges(model), model)
    assert folded.weights["model.2.cv1.conv"][3] == pytest.approx(AMAX_FLOOR, rel=1e-6)


def test_state_survives_json_and_refuses_nonsense(state: QuantState, tmp_path: Path) -> None:
    (tmp_path / "quant.json").write_text(state.dumps())
    assert QuantState.load(tmp_path / "quant.json") == state
    for broken in (
        "",
        "[]",
        "{}",
        state.dumps()[:-9],
        state.dumps().replace('"version": 3', '"version": 2'),
        state.dumps().replace('"weight_bits": 8', '"weight_bits": 4'),
    ):
        (tmp_path / "quant.json").write_text(broken)
        with pytest.raises(CorruptArtifact, match="quantiser state|not usable JSON|expected a mapping"):
            QuantState.load(tmp_path / "quant.json")
    for amax in (0.0, float("nan"), float("inf"), -1.0):
        with pytest.raises(NumericsError, match=r"model\.0 "):
            replace(state, activations={**state.activations, "model.0": amax})


def test_state_of_another_network_is_refused(state: QuantState) -> None:
    other = net(yaml="yolov8s.yaml")
    with pytest.raises(CorruptArtifact, match=r"no tensor model\.99"):
        attach(net(), replace(state, activations={**state.activations, "model.99": 1.0}))
    for unshared in (
        {**state.activations, "model.2.m.0": 2 * state.activations["model.2.m.0"]},
        {name: amax for name, amax in state.activations.items() if name != "model.2.m.0"},
    ):
        with pytest.raises(CorruptArtifact, match=r"model\.2\.m\.0 have to share a scale"):
            attach(net(), replace(state, activations=unshared))
    with pytest.raises(CorruptArtifact, match=r"model\.0\.conv with 16 output channels"):
        attach(other, state)
    with pytest.raises(CorruptArtifact, match=r"model\.0\.conv has 16 output channels"):
        fold(state, other)


@pytest.mark.fault(26)
def test_hook_trains_resumes_and_gives_back_a_stock_model() -> None:
    model = net()
    start = ranges(model)
    hook = FakeQuant(ranges, start)
    hook.on_model(model)
    ema = deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    model(images(2))["scores"].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for kept, new in zip(ema.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 0.5)
    other = ranges(net(seed=1))
    resumed, again = net(seed=1), FakeQuant(ranges, other)
    again.load_state_dict(hook.state_dict())
    again.on_model(resumed)
    resumed.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(resumed), output(model))
    later, third = net(seed=1), FakeQuant(ranges, other)
    third.on_model(later)
    third.load_state_dict(hook.state_dict())
    assert read(later) == read(model) != other

    expected = output(ema)
    hook.to_stock(ema)
    assert hook.state.outputs
    assert not any("Quant" in type(module).__name__ for module in ema.modules())
    attach(ema, hook.state)
    assert torch.equal(output(ema), expected)


@pytest.mark.fault(62)
def test_without_modelopt(state: QuantState, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(EnvironmentLacks, match="pip install nvidia-modelopt huggingface_hub"):
        attach(net(), state)


def test_seven_bits_of_weight_are_127_codes(state: QuantState) -> None:
    model = net()
    attach(model, replace(state, weight_bits=7))
    conv = model.model[3].conv
    amax_C = torch.tensor(state.weights["model.3.conv"]).view(-1, 1, 1, 1)
    codes = conv.weight_quantizer(conv._parameters["weight"]).detach() * 63 / amax_C
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.abs().amax(dim=(1, 2, 3)).round().eq(63).all()


def test_learned_ranges_start_as_the_fixed_ones_and_follow_equation_3(state: QuantState) -> None:
    """LSQ, arXiv 1902.08153: the gradient by the scale is round(v) - v inside the range, and -Q_N or Q_P outside."""
    fixed, learned = net(), net()
    attach(fixed, state)
    attach(learned, state, learned=True)
    assert read(learned).convs == read(fixed).convs
    for tensor, amax in read(fixed).activations.items():
        assert read(learned).activations[tensor] == pytest.approx(amax, rel=1e-6)
    assert torch.allclose(output(learned), output(fixed), atol=0.02 * float(output(fixed).abs().max()))

    ranged = LearnedRange(torch.tensor(2.54), 8, narrow_range=False)  # step 0.02
    x = torch.tensor([0.013, -0.5055, 9.0, -9.0], requires_grad=True)
    ranged(x).sum().backward()
    v = torch.tensor([0.013, -0.5055]) / 0.02
    by_step = float((v.round() - v).sum() + 127 - 128)
    factor = 1 / (4 * 127) ** 0.5
    assert float(ranged.log_amax.grad) == pytest.approx(by_step * 0.02 * factor, rel=1e-4)
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_learned_ranges_are_trained_resumed_and_given_back() -> None:
    model = net()
    hook = FakeQuant(ranges, ranges(model), learned=True)
    hook.on_model(model)
    start = read(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    predictions = model(images(2))
    (predictions["scores"].square().mean() + predictions["boxes"].square().mean()).backward()
    optimizer.step()
    model.eval()
    moved = read(model)
    assert all(moved.activations[name] != amax for name, amax in start.activations.items())
    assert all(moved.weights[name] != amax_C for name, amax_C in start.weights.items())
    resumed, again = net(seed=1), FakeQuant(ranges, hook.state, learned=True)
    again.on_model(resumed)
    resumed.load_state_dict(model.state_dict(), strict=True)
    held = dict(resumed.named_parameters())
    again.load_state_dict(hook.state_dict())
    assert all(held[name] is parameter for name, parameter in resumed.named_parameters())  # the optimizer's own
    assert torch.equal(output(resumed), output(model))
    hook.to_stock(model)
    assert hook.state.activations == moved.activations
    assert not any("Quant" in type(module).__name__ for module in model.modules())
