"""A pruned model computes what the unpruned model does with the same channels set to 0, and has stock classes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from tests.support.random_norms import with_random_norms
from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.families import check_prunable
from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.prune.criteria import bn_gamma
from yolo_compress.prune.graph import Group, Member, prunable, prune


def lively(size="n", nc=80, ch=3, seed=0, family="yolov8"):
    """A float64 model with random BatchNorms; new ones are identities."""
    torch.manual_seed(seed)
    model = DetectionModel(f"{family}{size}.yaml", ch=ch, nc=nc, verbose=False).double().eval()
    return with_random_norms(model)


def random_keep(groups, seed):
    """Random valid keep-lists: from one step to all, equal shares within a tie."""
    generator = torch.Generator().manual_seed(seed)
    counts = {}
    keep = {}
    for group in groups:
        count = counts.setdefault(group.tie, int(torch.randint(1, group.steps + 1, (1,), generator=generator)))
        keep[group.name] = torch.randperm(group.width, generator=generator)[: count * group.step].sort().values
    return keep


def silenced(model, groups, keep):
    """The unpruned model with gamma and beta of every removed channel at 0. SiLU(0) = 0, so the channel has no effect."""
    dense = copy.deepcopy(model)
    for group in groups:
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[keep[group.name]] = False
        for member in group.having("norm"):
            norm = dense.get_submodule(member.module)
            index = gone.nonzero().flatten() + member.offset
            with torch.no_grad():
                norm.weight[index] = 0
                norm.bias[index] = 0
    return dense


def assert_oracle(size, nc, ch, seed, imgsz=64, family="yolov8"):
    model = lively(size, nc, ch, seed, family)
    groups = prunable(model)
    keep = random_keep(groups, seed)
    images = torch.rand(1, ch, imgsz, imgsz, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, raw = silenced(model, groups, keep)(images)
        prune(model, keep)
        got, got_raw = model(images)
    assert (got - expected).abs().max() < 1e-9
    for one, other in zip(detect.by_branch(got_raw).values(), detect.by_branch(raw).values(), strict=True):
        assert all((one[name] - other[name]).abs().max() < 1e-9 for name in ("boxes", "scores"))
    return model, groups, keep


@pytest.mark.fault(34, 35)
@pytest.mark.parametrize("family", ["yolov8", "yolo11", "yolo26"])
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(nc=st.integers(1, 300), ch=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_pruned_equals_silenced_dense(family, nc, ch, seed):
    assert_oracle("n", nc, ch, seed, family=family)


@pytest.mark.fault(34, 35)
@pytest.mark.parametrize(
    ("family", "size"), [("yolov8", "s"), ("yolo11", "s"), ("yolo26", "s"), ("yolov8", "n-p2"), ("yolov8", "n-p6")]
)
def test_pruned_equals_silenced_dense_s_p2_p6(family, size):
    assert_oracle(size, nc=3, ch=3, seed=1, family=family)


@pytest.mark.fault(34, 35)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size"),
    [("yolov8", "m"), ("yolov8", "l"), *((family, size) for family in ("yolo11", "yolo26") for size in "mlx")],
)
def test_pruned_equals_silenced_dense_large(family, size):
    assert_oracle(size, nc=80, ch=3, seed=2, family=family)


@pytest.mark.slow
@pytest.mark.fault(34, 35)
def test_yolov8x_pruned_by_gamma_equals_silenced_dense():
    """All steps of `prune`: scores from gammas, a plan with half the MACs, removal. It takes 9 s and 2 GiB."""
    model = lively("x", nc=2)
    groups, shapes = prunable(model), conv_shapes(model, (64, 64))
    scores = {group.name: bn_gamma(SimpleNamespace(model=model), group) for group in groups}
    plan = choose(model, groups, scores, keep_flops(shapes, 0.5), 16, shapes)
    dense = silenced(model, groups, plan.keep)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, _ = dense(images)
        del dense
        prune(model, plan.keep)
        got, _ = model(images)
    assert (got - expected).abs().max() < 1e-9
    assert 0.49 < sum(shape.macs for shape in conv_shapes(model, (64, 64)).values()) / plan.macs_before <= 0.5
    for group in groups:  # no removed channel has a larger score than a remaining one
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[plan.keep[group.name]] = False
        assert not gone.any() or scores[group.name][gone].max() <= scores[group.name][~gone].min()


@pytest.fixture(scope="module")
def groups():
    return {group.name: group for group in prunable(lively())}


def test_every_channel_but_the_outputs_is_in_one_group(groups):
    model = lively()
    writers = {}
    for group in groups.values():
        for member in group.having("out"):
            writers.setdefault(member.module, []).extend(range(member.offset, member.offset + group.width))
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    outputs = check_prunable(model).outputs
    assert len(outputs) == 7 and set(outputs) <= set(convs)
    assert set(writers) == set(convs) - set(outputs)
    assert all(sorted(channels) == list(range(convs[name].out_channels)) for name, channels in writers.items())
    norms = {member.module for group in groups.values() for member in group.having("norm")}
    assert norms == {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def test_shortcuts_are_tied_in_the_backbone_and_free_in_the_neck(groups):
    tied = groups["model.4.cv1b"]
    assert [member.module for member in tied.having("out")].count("model.4.cv1.conv") == 1
    assert {member.module for member in tied.having("out")} == {
        "model.4.cv1.conv",
        "model.4.m.0.cv2.conv",
        "model.4.m.1.cv2.conv",
    }
    assert {member.offset for member in tied.having("in") if member.module == "model.4.cv2.conv"} == {32, 64, 96}
    assert Member("model.4.cv1.bn", "norm", 32) in tied.members
    assert groups["model.12.cv1b"].having("out") == (Member("model.12.cv1.conv", "out", 64),)
    assert "model.12.m.0.cv2" in groups


def test_halves_are_tied_and_have_their_own_channels(groups):
    first, second = groups["model.2.cv1a"], groups["model.2.cv1b"]
    assert first.tie == second.tie == "model.2.cv1"
    assert first.having("out") == (Member("model.2.cv1.conv", "out", 0),)
    assert groups["model.0"].tie == "model.0"


def test_concat_and_pooling_offsets(groups):
    assert {member.offset for member in groups["model.9.cv1"].having("in")} == {0, 128, 256, 384}
    assert groups["model.9.cv2"].having("in") == (
        Member("model.12.cv1.conv", "in", 0),
        Member("model.21.cv1.conv", "in", 128),
    )


def test_unit_is_the_largest_power_of_two():
    assert [Group("x", width, "x", ()).unit for width in (1, 7, 12, 80, 64, 100)] == [1, 1, 4, 16, 64, 4]


@pytest.mark.parametrize("family", ["yolov8", "yolo11", "yolo26"])
def test_result_is_stock_trains_and_loads_under_safe_load(tmp_path, family):
    model, groups, keep = assert_oracle("n", nc=3, ch=3, seed=5, family=family)
    stock = DetectionModel(f"{family}n.yaml", nc=3, verbose=False)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert model.yaml == stock.yaml
    assert model.model[2].c == model.model[2].cv1.conv.out_channels // 2 == len(keep["model.2.cv1a"])
    assert [layer.np for layer in model.model] == [sum(p.numel() for p in layer.parameters()) for layer in model.model]
    assert not any(parameter.requires_grad for parameter in model.model[-1].dfl.parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups), name

    float_model = model.float()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = float_model(images)[0]
    torch.save({"model": float_model, "train_args": {}}, tmp_path / "pruned.pt")
    from ultralytics.nn import tasks

    assert tasks.SAFE_LOAD, "these tests must run with ULTRALYTICS_SAFE_LOAD=1"
    loaded, _ = load_checkpoint(tmp_path / "pruned.pt")
    with torch.no_grad():
        assert torch.equal(loaded(images)[0], expected)

    fused = copy.deepcopy(float_model).fuse(verbose=False)
    with torch.no_grad():
        assert (fused(images)[0] - expected).abs().max() < 0.01  # px

    raw = detect.by_branch(float_model.train()(torch.rand(2, 3, 64, 64)))
    sum(one["boxes"].mean() + one["scores"].mean() for one in raw.values()).backward()
    trainable = [parameter for parameter in float_model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in trainable)


@pytest.mark.parametrize("family", ["yolov8", "yolo11", "yolo26"])
def test_a_pruned_model_can_be_pruned_again(family):
    model, _, _ = assert_oracle("n", nc=3, ch=3, seed=7, family=family)
    groups = prunable(model)
    keep = random_keep(groups, 8)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = silenced(model, groups, keep)(images)[0]
        prune(model, keep)
        assert (model(images)[0] - expected).abs().max() < 1e-9


def test_half_precision_frozen_and_no_grad_callers_work():
    model = lively().half().requires_grad_(False)
    with torch.inference_mode():
        groups = prunable(model)
    with torch.no_grad():
        prune(model, {"model.0": torch.arange(8)})
    assert len(groups) == len(prunable(lively()))
    assert model.model[0].conv.weight.shape[0] == model.model[1].conv.in_channels == 8
    assert model.model[0].conv.weight.dtype is torch.float16
    assert not model.model[0].conv.weight.requires_grad


def test_prunable_leaves_the_model_alone():
    model = lively()
    calls = []
    model.model[0].register_forward_hook(lambda *_: calls.append(1))
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    prunable(model)
    assert calls == []
    assert [module.training for module in model.modules()] == modes
    assert all(id(t) == tensors[n][0] and torch.equal(t, tensors[n][1]) for n, t in model.named_parameters())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"model.99": torch.tensor([0])}, "unknown group 'model.99'"),
        ({"model.0": torch.tensor([], dtype=torch.long)}, "model.0 must be ascending, not empty"),
        ({"model.0": torch.tensor([1, 0])}, "ascending"),
        ({"model.0": torch.tensor([0, 0])}, "ascending"),
        ({"model.0": torch.tensor([16])}, r"within 0\.\.15"),
        ({"model.2.cv1a": torch.arange(8)}, "must keep equal shares"),
    ],
)
def test_bad_keep_lists_change_nothing(keep, message):
    model = lively()
    with pytest.raises(RecipeError, match=message):
        prune(model, keep)
    assert model.model[0].conv.out_channels == 16


@pytest.mark.fault(33)
def test_nan_weights_stop_the_surgery():
    model = lively()
    with torch.no_grad():
        model.model[0].conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.0\.conv\.weight"):
        prunable(model)
