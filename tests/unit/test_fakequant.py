"""Placement, fake quantisation, its state and the QAT hook; fake quantisation is held against the formula."""

from __future__ import annotations

import io
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quant_net import images, net
from torch import Tensor, nn

from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, NumericsError
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import FakeQuant, attach, detach, read
from yolo_compress.quant.placement import plan
from yolo_compress.quant.state import AMAX_FLOOR, QuantState, fold


def ranges(model: nn.Module) -> QuantState:
    return ptq(model, lambda: [images(4)], "max")


@pytest.fixture(scope="module")
def state() -> QuantState:
    return ranges(net())


def quantised(x: Tensor, amax: Tensor, low: int) -> Tensor:
    return (x * 127 / amax).round().clamp(low, 127) * amax / 127


def codes(weight: Tensor, amax_C: tuple[float, ...]) -> Tensor:
    """INT8 codes of a weight, in float64."""
    return (weight.detach().double() * 127 / torch.tensor(amax_C, dtype=torch.float64).view(-1, 1, 1, 1)).round()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(2, seed=5))[0]


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


def test_attached_convolution_follows_the_formula(state: QuantState) -> None:
    model = net()
    conv: nn.Conv2d = model.model[3].conv
    weight, name = conv.weight.detach().clone(), "model.3.conv"
    x = torch.randn(2, conv.in_channels, 8, 8) * state.activations[name]  # a third is out of range
    attach(model, state)
    with torch.no_grad():
        got = conv(x)
        expected = nn.functional.conv2d(
            quantised(x, torch.tensor(state.activations[name]), -128),
            quantised(weight, torch.tensor(state.weights[name]).view(-1, 1, 1, 1), -127),
            stride=conv.stride,
            padding=conv.padding,
        )
    step = state.activations[name] / 127 * max(state.weights[name])  # one code off in one product: a rounding tie
    assert (got - expected).abs().max() <= 1.1 * step
    assert (got - expected).abs().mean() <= 1e-3 * step


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
    conv = model.model[1].conv
    x = torch.randn(2, conv.in_channels, 8, 8, requires_grad=True)
    conv(x).sum().backward()
    amax_C = torch.tensor(state.weights["model.1.conv"]).view(-1, 1, 1, 1)
    weight = quantised(conv._parameters["weight"].detach(), amax_C, -127)
    clean = x.detach().clone().requires_grad_()
    nn.functional.conv2d(clean, weight, stride=conv.stride, padding=conv.padding).sum().backward()
    assert torch.allclose(x.grad, clean.grad, atol=1e-3)
    model.train()
    predictions = model(images(2))
    (predictions["boxes"].square().mean() + predictions["scores"].square().mean()).backward()
    for name in state.convs:
        gradient = model.get_submodule(name)._parameters["weight"].grad
        assert gradient is not None and bool(torch.isfinite(gradient).all()) and gradient.abs().max() > 0, name


def test_folding_moves_no_code(state: QuantState) -> None:
    """Gammas have both signs: every INT8 code stays, but for its sign. Ultralytics' own fold agrees on the ranges.

    Codes are compared, not outputs of whole nets: there the order of float sums (the number of threads) decides rounding
    ties, which later layers amplify.
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
        assert moved.max() <= 1 and moved.count_nonzero() <= 1e-4 * moved.numel(), name  # float32 ties at half a code
    ultralytics = read(attached.fuse(verbose=False))
    for name in state.convs:
        assert ultralytics.weights[name] == pytest.approx(folded_state.weights[name], rel=1e-5), name
    with pytest.raises(CorruptArtifact, match="folded into it already"):
        fold(folded_state, folded)


def test_channel_with_gamma_zero_keeps_a_scale() -> None:
    model = net()
    model.model[2].cv1.bn.weight.data[3] = 0.0
    folded = fold(ranges(model), model)
    assert folded.weights["model.2.cv1.conv"][3] == pytest.approx(AMAX_FLOOR, rel=1e-6)


def test_state_survives_json_and_refuses_nonsense(state: QuantState, tmp_path: Path) -> None:
    (tmp_path / "quant.json").write_text(state.dumps())
    assert QuantState.load(tmp_path / "quant.json") == state
    for broken in ("", "[]", "{}", state.dumps()[:-9], state.dumps().replace('"version": 1', '"version": 2')):
        (tmp_path / "quant.json").write_text(broken)
        with pytest.raises(CorruptArtifact, match="quantiser state"):
            QuantState.load(tmp_path / "quant.json")
    for amax in (0.0, float("nan"), float("inf"), -1.0):
        with pytest.raises(NumericsError, match=r"model\.0\.conv"):
            replace(state, activations={**state.activations, "model.0.conv": amax})
    with pytest.raises(CorruptArtifact, match=r"model\.0\.conv"):
        replace(state, activations={name: 1.0 for name in state.convs[1:]})


def test_state_of_another_network_is_refused(state: QuantState) -> None:
    other = net(yaml="yolov8s.yaml")
    with pytest.raises(CorruptArtifact, match=r"model\.0\.conv with 16 output channels"):
        attach(other, state)
    with pytest.raises(CorruptArtifact, match=r"model\.0\.conv has 16 output channels"):
        fold(state, other)


def test_hook_trains_resumes_and_gives_back_a_stock_model() -> None:
    calls = []

    def calibrate(model: nn.Module) -> QuantState:
        calls.append(model)
        return ranges(model)

    model, hook = net(), FakeQuant(calibrate)
    hook.on_model(model)
    ema = deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    model(images(2))["scores"].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for kept, new in zip(ema.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 0.5)
    resumed, again = net(seed=1), FakeQuant(calibrate)
    again.load_state_dict(hook.state_dict())
    again.on_model(resumed)
    resumed.load_state_dict(model.state_dict(), strict=True)
    assert calls == [model]  # a resumed run does not calibrate
    assert torch.equal(output(resumed), output(model))
    later, third = net(seed=1), FakeQuant(calibrate)
    third.on_model(later)
    third.load_state_dict(hook.state_dict())
    assert read(later) == read(model)

    expected = output(ema)
    hook.to_stock(ema)
    assert hook.state is not None and hook.state.outputs
    assert not any("Quant" in type(module).__name__ for module in ema.modules())
    attach(ema, hook.state)
    assert torch.equal(output(ema), expected)


def test_without_modelopt(state: QuantState, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(EnvironmentLacks, match="pip install nvidia-modelopt huggingface_hub"):
        attach(net(), state)


def test_seven_bits_of_weight_are_127_codes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    amax_C = model[0].weight.detach().abs().amax(dim=(1, 2, 3))
    state = QuantState({"0": 1.0}, {"0": tuple(amax_C.tolist())})
    attach(model, state, weight_bits=7)
    codes = model[0].weight_quantizer(model[0].weight).detach() * 63 / amax_C.view(-1, 1, 1, 1)
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.abs().amax(dim=(1, 2, 3)).round().tolist() == [63, 63, 63, 63]
