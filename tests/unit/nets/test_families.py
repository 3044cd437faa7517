"""Each family is recognised by its layers, everything else is refused by name, and the data flow has all channels once."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import DFL, Conv, DWConv
from ultralytics.nn.modules.block import PSABlock
from ultralytics.nn.tasks import DetectionModel, parse_model, yaml_model_load

from tests.support.quant_net import net
from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.conv import check_depthwise, keep_channels
from yolo_compress.nets.families import check_prunable, family_of, flow_of
from yolo_compress.nets.flow import IMAGES, Flow
from yolo_compress.prune.graph import Member, check_keep, prunable, prune


@pytest.mark.parametrize("name", ["yolov8", "yolo11", "yolo26"])
def test_every_size_is_of_its_family_and_every_channel_is_in_one_slice(name):
    for size in "nsmlx":
        model = nn.Module()
        with torch.device("meta"):
            model.model = parse_model(yaml_model_load(f"{name}{size}.yaml"), 3, False)[0]
        assert family_of(model, "prune").name.lower() == name
        flow = flow_of(model, "prune")
        held = {}
        for piece, members in flow.members.items():
            for member in members:
                held.setdefault((member.module, member.role), []).append((member.offset, flow.widths[piece]))
        for module, conv in model.named_modules():
            if isinstance(conv, nn.Conv2d):
                last = isinstance(model.get_submodule(module.rpartition(".")[0]), nn.Sequential)  # a bare convolution
                out = 0 if last or module.endswith("dfl.conv") else conv.out_channels
                inputs = conv.groups == 1 and module != "model.0.conv" and not module.endswith("dfl.conv")
                read = conv.in_channels if inputs else 0
                assert (module in flow.reads) != (module in flow.training)
                for role, channels in (("out", out), ("in", read)):
                    end = 0
                    for offset, width in sorted(held.pop((module, role), [])):
                        assert offset == end, (module, role)
                        end += width
                    assert end == channels, (module, role)
        assert {role for _, role in held} == {"norm"}


@pytest.fixture(scope="module")
def eleven():
    return {group.name: group for group in prunable(DetectionModel("yolo11n.yaml", verbose=False))}


def test_attention_keeps_its_heads_and_values_go_with_the_stream(eleven):
    stream, value = eleven["model.10.cv1b"], eleven["model.10.m.0.attn.qkv.v1"]
    assert stream.tie == value.tie == eleven["model.10.cv1a"].tie == "model.10.cv1"
    assert (stream.width, stream.step, stream.steps) == (128, 2, 64), "one channel of each of the two heads"
    assert (value.width, value.step, value.steps) == (64, 1, 64)
    assert {member.module for member in stream.having("out")} == {
        "model.10.cv1.conv",
        "model.10.m.0.attn.proj.conv",
        "model.10.m.0.ffn.1.conv",
    }
    assert value.having("out") == (
        Member("model.10.m.0.attn.qkv.conv", "out", 192),
        Member("model.10.m.0.attn.pe.conv", "out", 64),
    )
    assert value.having("in") == (Member("model.10.m.0.attn.proj.conv", "in", 64),)
    assert eleven["model.10.m.0.ffn.0"].tie == "model.10.m.0.ffn.0"
    assert not any("qk0" in name for name in eleven), "queries and keys stay"


def test_a_depthwise_channel_goes_with_its_neighbour(eleven):
    group = eleven["model.16.cv2"]
    assert Member("model.23.cv3.0.0.0.conv", "out", 0) in group.members
    assert Member("model.23.cv3.0.0.0.bn", "norm", 0) in group.members
    assert {member.module for member in group.having("in")} == {
        "model.17.conv",
        "model.23.cv2.0.0.conv",
        "model.23.cv3.0.0.1.conv",
    }


def test_shares_of_a_tie_are_equal(eleven):
    tied = [group for group in eleven.values() if group.tie == "model.10.cv1"]
    check_keep(eleven.values(), {group.name: torch.arange(10 * group.step) for group in tied})
    for wrong in ({"model.10.cv1b": torch.arange(64)}, {group.name: torch.arange(64) for group in tied}):
        with pytest.raises(RecipeError, match="must keep equal shares"):
            check_keep(eleven.values(), wrong)


def test_attributes_follow_the_channels():
    model = DetectionModel("yolo11n.yaml", verbose=False)
    prune(model, {g.name: torch.arange(12 * g.step) for g in prunable(model) if g.tie == "model.10.cv1"})
    block = model.model[10]
    assert (block.c, block.m[0].attn.head_dim, block.m[0].attn.key_dim, block.m[0].attn.num_heads) == (24, 12, 32, 2)
    pe = block.m[0].attn.pe.conv
    assert (pe.in_channels, pe.out_channels, pe.groups) == (24, 24, 24)


def test_keep_channels_selects_and_keeps_flags():
    conv = nn.Conv2d(4, 6, 3).requires_grad_(False)
    weight, bias = conv.weight.clone(), conv.bias.clone()
    keep_channels(conv, torch.tensor([0, 5]), torch.tensor([1, 3]))
    assert torch.equal(conv.weight, weight[[0, 5]][:, [1, 3]])
    assert torch.equal(conv.bias, bias[[0, 5]])
    assert (conv.out_channels, conv.in_channels, conv.weight.requires_grad) == (2, 2, False)
    with pytest.raises(TypeError, match="Linear"):
        keep_channels(nn.Linear(2, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    ("yaml", "block"),
    [
        ("yolo12n.yaml", r"model\.6 is a A2C2f"),
        ("yolov10n.yaml", r"model\.5 is a SCDown"),
        ("yolov8n-cls.yaml", r"model\.9 is a Classify head"),
        ("yolov5n.yaml", r"model\.2 is a C3"),
    ],
)
def test_other_architectures_are_named(yaml, block):
    with pytest.raises(RecipeError, match=block):
        check_prunable(DetectionModel(yaml, verbose=False) if "cls" not in yaml else classifier(yaml))


def classifier(yaml):
    from ultralytics.nn.tasks import ClassificationModel

    return ClassificationModel(yaml, verbose=False)


def test_segmentation_head_is_named():
    from ultralytics.nn.tasks import SegmentationModel

    with pytest.raises(RecipeError, match=r"model\.22 is a Segment head"):
        check_prunable(SegmentationModel("yolov8n-seg.yaml", verbose=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m[10].m[0], "add", False), r"model\.10\.m\.0 is a PSABlock without shortcuts"),
        (lambda m: setattr(m[10].m[0].attn, "head_dim", 32), r"2 heads with 32 keys and 32 values, which do not fit"),
        (lambda m: m[10].m.__setitem__(0, nn.Identity()), r"model\.10\.m\.0 is a Identity, expected PSABlock"),
        (
            lambda m: m[22].m.__setitem__(0, nn.Sequential(PSABlock(64))),
            r"m\.0 is a Sequential, expected Bottleneck or C3k",
        ),
        (
            lambda m: m[23].cv3[0].__setitem__(0, Conv(64, 80, 3, g=2)),
            r"cv3\.0\.0\.conv is a grouped convolution \(groups=2\)",
        ),
    ],
)
def test_variants_of_blocks_are_named(change, message):
    model = DetectionModel("yolo11n.yaml", verbose=False)
    change(model.model)
    with pytest.raises(RecipeError, match=message):
        check_prunable(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[22].m[0].__setitem__(0, nn.Identity()), r"m\.0 is Identity and PSABlock, expected a Bottleneck"),
        (
            lambda m: setattr(m[22].m[0][0], "add", False),
            r"model\.22\.m\.0 is Bottleneck and PSABlock, expected a Bott",
        ),
        (
            lambda m: setattr(m[23], "cv2", None),
            r"model\.23 has no cv2 \(a fused model\); give the checkpoint as it was",
        ),
        (lambda m: setattr(m[23], "dfl", DFL(16)), r"model\.23\.dfl is a DFL, expected Identity \(reg_max = 1\)"),
        (lambda m: setattr(m[23], "one2one_cv2", None), r"model\.22\.m\.0 is a Sequential, expected Bottleneck or C3k"),
        (
            lambda m: m[23].one2one_cv3[0][0].__setitem__(1, Conv(64, 80, 1, g=2)),
            r"one2one_cv3\.0\.0\.1\.conv is a grouped",
        ),
    ],
)
def test_variants_of_yolo26_are_named(change, message):
    model = DetectionModel("yolo26n.yaml", verbose=False)
    change(model.model)
    with pytest.raises(RecipeError, match=message):
        check_prunable(model)


def test_an_end_to_end_head_on_another_family_is_named():
    model = DetectionModel({**yaml_model_load("yolov8n.yaml"), "end2end": True}, verbose=False)
    with pytest.raises(RecipeError, match=r"prune: model\.22 is a Detect head without NMS; supported are YOLOv8"):
        check_prunable(model)


@pytest.fixture(scope="module")
def twentysix():
    return {group.name: group for group in prunable(DetectionModel("yolo26n.yaml", verbose=False))}


def test_the_one_to_many_branches_keep_their_widths_and_lose_the_channels_they_read(twentysix):
    assert not any(name.startswith(("model.23.cv2", "model.23.cv3")) for name in twentysix)
    read = {member.module for member in twentysix["model.16.cv2"].having("in")}
    assert {"model.23.cv2.0.0.conv", "model.23.cv3.0.0.1.conv", "model.23.one2one_cv2.0.0.conv"} <= read
    written = {member.module for member in twentysix["model.16.cv2"].having("out")}
    assert {"model.23.cv3.0.0.0.conv", "model.23.one2one_cv3.0.0.0.conv"} <= written


def test_the_shortcut_of_an_sppf_joins_its_input_with_its_output(twentysix):
    written = {member.module for member in twentysix["model.8.cv2"].having("out")}
    assert written == {"model.8.cv2.conv", "model.9.cv2.conv"} and "model.9.cv2" not in twentysix


def test_attention_in_a_c3k2_keeps_its_heads(twentysix):
    stream, value = twentysix["model.22.cv1b"], twentysix["model.22.m.0.1.attn.qkv.v0"]
    assert stream.tie == value.tie == twentysix["model.22.cv1a"].tie == "model.22.cv1"
    assert {member.module for member in stream.having("out")} == {
        "model.22.cv1.conv",
        "model.22.m.0.0.cv2.conv",
        "model.22.m.0.1.attn.proj.conv",
        "model.22.m.0.1.ffn.1.conv",
    }


def test_a_deployed_model_returns_the_rows_from_which_ultralytics_takes_the_best():
    model = net(yaml="yolo26n.yaml").double()
    for branch in [*detect.class_branches(model), *detect.box_branches(model)]:
        nn.init.normal_(branch[-1].weight, std=0.02)
        nn.init.zeros_(branch[-1].bias)
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    model.end2end = True
    with torch.no_grad():
        expected = model(images)[0]  # x1, y1, x2, y2, score, class
        plain = copy.deepcopy(model)
        detect.deploy(plain)
        pickled = pickle.loads(pickle.dumps(plain))
        for deployed in (plain, copy.deepcopy(plain), pickled, detect.fuse(copy.deepcopy(model))):
            assert not any(name.startswith(("model.23.cv2.", "model.23.cv3.")) for name, _ in deployed.named_modules())
            got = deployed(images)
            assert got.shape == (2, 7, 126) and not detect.needs_nms(deployed)
            for one, rows in zip(got, expected, strict=True):
                best = one[4:].flatten().topk(20)
                anchor = best.indices % one.shape[1]
                corners = torch.cat([one[:2] - one[2:4] / 2, one[:2] + one[2:4] / 2]).T[anchor]
                assert torch.allclose(best.values, rows[:20, 4], atol=1e-5)
                assert torch.allclose(corners, rows[:20, :4], atol=1e-3)
                assert torch.equal((best.indices // one.shape[1]).double(), rows[:20, 5])
    assert len(detect.only_trained(model)) > 24 and not detect.only_trained(plain)


def test_the_losses_of_the_branches_have_ultralytics_weights():
    model = DetectionModel("yolo26n.yaml", nc=3, verbose=False)
    for epochs in (1, 2, 7):
        model.args = SimpleNamespace(epochs=epochs, box=7.5, cls=0.5, dfl=1.5)
        criterion = model.init_criterion()
        for epoch in range(epochs):
            weights = detect.branch_weights(epoch, epochs)
            expected = {"one2many": criterion.o2m, "one2one": criterion.o2o}
            assert {name: weights[name] for name in expected} == pytest.approx(expected, abs=1e-12)
            criterion.update()


def test_only_equal_slices_are_summed():
    model = DetectionModel("yolov8n.yaml", verbose=False)
    flow = Flow(model)
    whole = flow.conv("model.0", flow.new(IMAGES))
    parts = flow.conv("model.1", whole, {"a": 16, "b": 16})
    with pytest.raises(RecipeError, match=r"x adds tensors of slices of \[16, 16\] and \[16\] channels"):
        flow.sum("x", "y", parts, whole)
    with pytest.raises(ValueError, match=r"model\.1 is a layer"):
        flow.shortcut("model.1", whole)


def test_grouped_convolutions_are_not_depthwise():
    check_depthwise("a", DWConv(8, 8, 3))
    for block in (Conv(8, 8, 3, g=4), DWConv(8, 16, 3)):
        with pytest.raises(RecipeError, match="a grouped convolution|8 inputs and 16 outputs"):
            check_depthwise("a", block)


def test_depthwise_channels_are_kept_on_both_sides():
    conv = nn.Conv2d(6, 6, 3, groups=6)
    weight = conv.weight.clone()
    keep_channels(conv, torch.tensor([1, 4]))
    assert torch.equal(conv.weight, weight[[1, 4]])
    assert (conv.in_channels, conv.out_channels, conv.groups) == (2, 2, 2)
    assert conv(torch.zeros(1, 2, 4, 4)).shape == (1, 2, 2, 2)


def test_fused_model_is_named():
    model = DetectionModel("yolov8n.yaml", verbose=False).eval().fuse(verbose=False)
    with pytest.raises(RecipeError, match=r"model\.0 has no BatchNorm"):
        check_prunable(model)


def test_wrapped_and_foreign_modules_are_named():
    model = DetectionModel("yolov8n.yaml", verbose=False)
    nn.utils.parametrizations.weight_norm(model.model[1].conv)
    with pytest.raises(RecipeError, match=r"model\.1\.conv is a ParametrizedConv2d"):
        check_prunable(model)
    with pytest.raises(RecipeError, match="Linear is not an Ultralytics model"):
        check_prunable(nn.Linear(1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensors_are_named(value):
    model = DetectionModel("yolov8n.yaml", verbose=False)
    model.model[4].m[0].cv1.bn.running_var[3] = value
    with pytest.raises(NumericsError, match=r"model\.4\.m\.0\.cv1\.bn\.running_var"):
        check_prunable(model)
