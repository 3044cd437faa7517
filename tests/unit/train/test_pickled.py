"""A checkpoint of others is read before it is loaded: what would call, ask the network or take memory never starts."""

from __future__ import annotations

import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn import tasks

from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.train import checkpoint
from yolo_compress.train import checkpoint as train_checkpoint
from yolo_compress.train.transfer import load_pretrained

# --- a program, written by hand ---------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(full: str) -> bytes:
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(full: str, *arguments: bytes) -> bytes:
    return name(full) + tuple_of(*arguments) + b"R"


def new(full: str, state: dict[str, bytes] | None = None, *arguments: bytes) -> bytes:
    made = name(full) + tuple_of(*arguments) + b"\x81"
    entries = b"".join(text(key) + value for key, value in (state or {}).items())
    return made if state is None else made + b"}(" + entries + b"ub"


def storage(key: str = "0", elements: int = 4, kind: str = "Float", device: str = "cpu") -> bytes:
    return tuple_of(text("storage"), name(f"torch.{kind}Storage"), text(key), text(device), number(elements)) + b"Q"


ORDERED = call("collections.OrderedDict")


def tensor(
    size: tuple[int, ...],
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    of: bytes | None = None,
    hooks: bytes = ORDERED,
) -> bytes:
    shapes = [tuple_of(*map(number, side)) for side in (size, stride)]
    return call("torch._utils._rebuild_tensor_v2", of or storage(), number(offset), *shapes, b"\x89", hooks)


def root(model: bytes) -> bytes:
    return b"\x80\x02}" + text("model") + model + b"s."


LAYER = "torch.nn.modules.linear.Identity"


def module(**state: bytes) -> bytes:
    """An Identity with these attributes, as torch pickles it."""
    plain = dict.fromkeys(("_parameters", "_buffers", "_modules"), ORDERED) | {"training": b"\x89"}
    return new(LAYER, plain | state)


def written(path: Path, program: bytes, compressed: bool = False, **members: bytes) -> Path:
    kept = {"version": b"3\n", "byteorder": b"little", "data/0": bytes(16)} | members
    how = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as archive:
        for member, data in {"data.pkl": program, **kept}.items():
            archive.writestr(f"archive/{member}", data)
    return path


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Why a program is refused; that its loader was not called is part of it."""

    def loads(*_: object, **__: object) -> None:
        pytest.fail("torch.load was called")

    monkeypatch.setattr(torch, "load", loads)

    def why(program: bytes, **options: Any) -> str:
        with pytest.raises(
            CorruptArtifact, match=r"evil\.pt: not a loadable YOLO checkpoint \(.*nothing in it was run"
        ) as caught:
            train_checkpoint.load_model(written(tmp_path / "evil.pt", program, **options))
        return str(caught.value)

    return why


def test_a_program_written_by_hand_is_loaded_where_it_is_sound(tmp_path: Path) -> None:
    """So that each refusal below is for its reason and not for the form of these programs."""
    parameter = call("torch._utils._rebuild_parameter", tensor((2, 2), (2, 1)), b"\x88", ORDERED)
    state = {"_parameters": b"}" + text("w") + parameter + b"s", "numbers": b"]" + number(3) + b"a"}
    loaded: Any = checkpoint.load_any(written(tmp_path / "m.pt", root(module(**state))))
    assert type(loaded) is nn.Identity and loaded.numbers == [3] and not loaded.training
    assert torch.equal(loaded.w, torch.zeros(2, 2)) and loaded.w.requires_grad


HOSTILE = {
    "a download by a constructor": (new("ultralytics.nn.modules.block.TorchVision", None, text("resnet18")), "arguments of the file"),
    "a request by a constructor": (call("ultralytics.nn.tasks.DetectionModel", text("http://127.0.0.1/x.yaml")), "is called"),
    "a net by its name": (call("ultralytics.nn.tasks.DetectionModel", text("yolov8x.yaml")), "is called"),
    "a large layer": (call("torch.nn.modules.linear.Linear", number(1 << 20), number(1 << 20)), "is called"),
    "2 GiB of zeros": (call("builtins.bytearray", number(1 << 31)), "'builtins.bytearray', which no YOLO"),
    "eval": (call("builtins.eval", text("1")), "'builtins.eval', which no YOLO"),
    "os.system": (call("posix.system", text("touch ran")), "'posix.system', which no YOLO"),
    "another method": (call("builtins.getattr", name(LAYER), text("__class__")), "getattr of"),
    "a method of a value": (call("builtins.getattr", text("x"), text("format")), "getattr of"),
    "arguments of getattr as data": (
        module(x=name("builtins.getattr") + name(LAYER) + b")\x81" + text("forward") + b"\x86q\x01Rh\x01\x85"),
        "that are data too",
    ),
    "a class as data": (module(forward=name("ultralytics.nn.modules.block.TorchVision")), "a class in place of data"),
    "hooks": (module(_forward_hooks=b"}" + number(0) + module() + b"s"), "a module with hooks"),
    "bytes of another encoding": (call("_codecs.encode", text("x"), text("zip")), "another encoding"),
    "a type of any size": (call("numpy.dtype", text("V2147483647")), "an argument"),
    "a tensor larger than its storage": (tensor((1 << 29,)), "beyond its 4 stored elements"),
    "a tensor of no end": (tensor((1 << 62, 1 << 62), (1, 1)), "beyond its 4 stored elements"),
    "one element as many": (tensor((1 << 31,), (0,)), "beyond its 4 stored elements"),
    "an offset before the bytes": (tensor((1,), (1,), offset=-1), "a size of -1"),
    "a negative stride": (tensor((2,), (-1,)), "a size of -1"),
    "an offset behind the bytes": (tensor((1,), (1,), offset=4), "beyond its 4 stored elements"),
    "a storage larger than its bytes": (tensor((1,), of=storage(elements=5)), "of 20 bytes, of which the archive has 16"),
    "wider items than its bytes": (tensor((1,), of=storage(kind="Double")), "of 32 bytes, of which the archive has 16"),
    "bytes that are not there": (tensor((1,), of=storage("9")), "'9' are not in the archive"),
    "a quantised tensor": (call("torch._utils._rebuild_qtensor"), "which no YOLO checkpoint holds"),
    "a tensor with hooks": (tensor((1,), hooks=b"}" + text("a") + number(1) + b"s"), "a tensor with hooks"),
    "a list in itself": (module(x=b"]q\x01(h\x01e"), "inside other data"),
    "a module filled later": (b"]q\x01]h\x01ah\x01K\x01a0", "inside other data"),
    "deep data": (module(x=b"]" * 300 + b"a" * 299), "deeper than 150"),
    "deep keys": (b"}" + b")" + b"\x85" * 100 + b"K\x01s", "a dictionary key that is neither"),
    "an instruction of newer pickles": (b"\x8e" + struct.pack("<Q", 1 << 40), ""),
    "a state that is no dictionary": (name(LAYER) + b")\x81]b", "not a dictionary by name"),
    "tensors alone": (ORDERED, "it contains no model"),
    "text that is filled": (b"K\x01K\x02", "adds items to something that is not a dict"),
    "an end in the middle": (b"K\x01." + b"0", "ends too early"),
    "more taken than made": (b"0a", ""),
}  # fmt: skip


@pytest.mark.fault(24)
@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_checkpoint_does_is_refused_unloaded(case: str, refused: Callable[..., str], tmp_path: Path) -> None:
    program, says = HOSTILE[case]
    assert says in refused(root(program))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_the_same_bytes_as_many_tensors_are_refused(refused: Callable[..., str]) -> None:
    """Each is a copy once it is made float32."""
    half = storage(elements=1 << 19, kind="Half")
    many = b"]" + b"".join(tensor((1 << 19,), of=half) + b"a" for _ in range(4))
    assert "many tensors that share the same stored bytes" in refused(
        root(module(x=many)), **{"data/0": bytes(1 << 20)}
    )


@pytest.mark.fault(24)
def test_an_endless_program_is_refused(refused: Callable[..., str]) -> None:
    assert "more than 1000000 instructions" in refused(root(b"]" + b"K\x01a" * 500_000))


@pytest.mark.fault(24)
def test_archives_that_are_not_torchs_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    plain = root(module())
    assert "compressed or encrypted" in refused(plain, compressed=True)
    assert "expected an archive with one data.pkl" in refused(plain, **{"constants.pkl": b""})
    path = written(tmp_path / "evil.pt", plain)
    whole = path.read_bytes()
    for content, says in {
        b"": "empty or cut short",
        whole[:-1]: "cut short",
        whole[:-2] + b"\x05\0note!": "not at the end|not an archive",
        whole + whole: "not at the end",
        pickle.dumps([1], 2) + bytes(30): "before 1.6",
    }.items():
        path.write_bytes(content)
        with pytest.raises(CorruptArtifact, match=says):
            train_checkpoint.load_model(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "evil.pt", root(module()))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", root(module()))
    with pytest.raises(CorruptArtifact, match="have the same name"):
        train_checkpoint.load_model(path)


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """Each member states the whole file."""
    path = written(tmp_path / "evil.pt", root(module()), **{f"data/{i}": bytes(1000) for i in range(1, 9)})
    data = bytearray(path.read_bytes())
    for sizes in (data.find(struct.pack("<II", 1000, 1000), at) for at in range(8000, len(data))):
        if sizes > 8000:
            data[sizes : sizes + 8] = struct.pack("<II", 5000, 5000)
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="more bytes than it has"):
        train_checkpoint.load_model(path)


@pytest.mark.fault(23)
def test_an_altered_byte_is_an_error_of_the_file_or_none(tmp_path: Path) -> None:
    torch.save({"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))}, tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    chance, outcomes = random.Random(0), []
    for _ in range(300):
        altered = bytearray(whole)
        altered[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        (tmp_path / "altered.pt").write_bytes(altered)
        try:
            checkpoint.load_any(tmp_path / "altered.pt")
            outcomes.append("loaded")
        except CompressError as error:
            outcomes.append(type(error).__name__)
    assert set(outcomes) == {"loaded", "CorruptArtifact"}


# --- what is sound ----------------------------------------------------------------------------------------------------


KINDS = {
    "yolov8n.yaml": tasks.DetectionModel,
    "yolov8n-seg.yaml": tasks.SegmentationModel,
    "yolov8n-pose.yaml": tasks.PoseModel,
    "yolov8n-obb.yaml": tasks.OBBModel,
    "yolov8n-cls.yaml": tasks.ClassificationModel,
    "yolo11n.yaml": tasks.DetectionModel,
    "yolo26n.yaml": tasks.DetectionModel,
    "yolov10n.yaml": tasks.DetectionModel,
}


@pytest.mark.parametrize("yaml", KINDS)
def test_checkpoints_of_every_task_load_as_ultralytics_loads_them(yaml: str, tmp_path: Path) -> None:
    """As training leaves them: EMA, optimizer, numpy scalars, paths, the loss beside the model."""
    net = KINDS[yaml](yaml, nc=3, verbose=False)
    net.names, net.args = {i: f"class {i}" for i in range(3)}, get_cfg()
    if yaml in ("yolov8n.yaml", "yolo26n.yaml"):
        net.criterion = net.init_criterion()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    next(net.parameters()).grad = torch.zeros_like(next(net.parameters()))
    optimizer.step()
    file = tmp_path / "it's last.pt"  # Ultralytics' own loader would look for "its last.pt"
    torch.save({"epoch": 3, "best_fitness": np.float64(0.3), "model": deepcopy(net).half(), "ema": deepcopy(net).half(),
                "updates": 7, "optimizer": optimizer.state_dict(), "train_args": {**vars(get_cfg()), "project": Path("/x")},
                "train_metrics": {"fitness": np.float64(0.1)}, "date": "2026-11-29", "version": "8"}, file)  # fmt: skip
    loaded: Any = checkpoint.load_any(file)
    file.rename(tmp_path / "plain.pt")
    theirs, _ = tasks.load_checkpoint(str(tmp_path / "plain.pt"))
    assert type(loaded) is type(theirs) and loaded.names == theirs.names and not loaded.training
    mine, other = loaded.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("ultralytics.nn.modules.Conv", "ultralytics.nn.modules.conv.Conv"),
        ("ultralytics.yolo.utils.IterableSimpleNamespace", "ultralytics.utils.IterableSimpleNamespace"),
        ("ultralytics.nn.tasks.YOLOv10DetectionModel", "ultralytics.nn.tasks.DetectionModel"),
        ("torch.nn.modules.container.Sequential", "torch.nn.modules.container.Sequential"),
    ],
)
def test_names_of_older_versions_are_those_of_today(old: str, now: str) -> None:
    found = checkpoint._resolve(old)
    assert f"{found.__module__}.{found.__name__}" == now


def test_a_name_that_is_no_layer_is_not_resolved() -> None:
    for full in ("ultralytics.nn.tasks.Path", "ultralytics.nn.modules.conv.autopad", "ultralytics.nn.tasks.Gone"):
        with pytest.raises((TypeError, AttributeError)):
            checkpoint._resolve(full)


def saved(path: Path, change: Callable[[Any], None]) -> Path:
    net = train_checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)
    change(net)
    torch.save({"model": net}, path)
    return path


def _set(owner: Callable[[Any], Any], attribute: str, value: object) -> Callable[[Any], None]:
    return lambda net: setattr(owner(net), attribute, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(lambda net: net.model[4].cv1.conv, "weight", nn.Parameter(torch.zeros(1, 1, 1, 1))), "RuntimeError"),
        (_set(lambda net: net.model[0].conv, "padding", (10**6, 10**6)), "model.0.conv has kernel, stride and dilation"),
        (_set(lambda net: net.model[0].conv, "stride", (0, 0)), "model.0.conv has kernel, stride and dilation"),
        (_set(lambda net: net.model[10], "scale_factor", 1e6), "model.10 upsamples by 1000000.0"),
        (_set(lambda net: net.model[3], "f", 99), "not a loadable"),
        (_set(lambda net: net.model[3].conv, "groups", "two"), "TypeError"),
        (_set(lambda net: net, "names", {0: "bolt"}), "2 scores an anchor for 1 class names"),
        (_set(lambda net: net, "names", {0: "bolt", 7: "nut"}), "not numbered from 0"),
        (_set(lambda net: net, "names", [["bolt"], ["nut"]]), "one of its class names is not text"),
        (_set(lambda net: net, "stride", None), "not a loadable"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit_together_are_found_at_the_door(tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(CorruptArtifact, match="not a loadable YOLO checkpoint") as caught:
        train_checkpoint.load_model(saved(tmp_path / "m.pt", change))
    assert says in str(caught.value)


def test_looking_at_it_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.pt", lambda net: None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        loaded = train_checkpoint.load_model(file)
        assert torch.equal(torch.random.get_rng_state(), before)
    as_saved = torch.load(file, weights_only=False)["model"].model[-1]
    for attribute in ("anchors", "strides", "shape"):
        mine, theirs = getattr(loaded.model[-1], attribute), getattr(as_saved, attribute)
        assert mine is theirs or torch.equal(mine, theirs)


def test_a_detection_part_is_made_of_stock_layers_of_the_files_own_size(tmp_path: Path) -> None:
    """The yaml of a checkpoint is arguments for constructors: layers that download, or are larger than its tensors."""

    def seg(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
        net = tasks.SegmentationModel("yolov8n-seg.yaml", nc=2, verbose=False)
        net.names = {0: "bolt", 1: "nut"}
        change(net.yaml)
        torch.save({"model": net}, path)
        return path

    sound = load_pretrained(seg(tmp_path / "s.pt", lambda yaml: None), ["bolt", "nut"], 0, detection_part=True)[0]
    assert isinstance(sound, tasks.DetectionModel)

    def repeated(yaml: dict[str, Any]) -> None:
        yaml["backbone"][2][1] = 10**9

    def wide(yaml: dict[str, Any]) -> None:
        yaml["scales"] = {"n": [1, 1e4, 1e9]}

    def vision(yaml: dict[str, Any]) -> None:
        yaml["backbone"][0] = [-1, 1, "TorchVision", [768, "resnet18", "DEFAULT", True, 2, False]]

    def other(yaml: dict[str, Any]) -> None:
        yaml.clear()

    for change in (repeated, wide, vision, other):
        with pytest.raises(RecipeError, match="its detection part cannot be loaded"):
            load_pretrained(seg(tmp_path / "s.pt", change), ["bolt", "nut"], 0, detection_part=True)


# --- files of other versions, and other forms -------------------------------------------------------------------------


def repickled(source: Path, out: Path, change: Callable[[bytes], bytes]) -> Path:
    """A checkpoint whose program is changed, its tensors as they are."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as other:
        for entry in archive.infolist():
            data = archive.read(entry)
            other.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return out


def as_8_0_0(program: bytes) -> bytes:
    """Ultralytics 8.0.0 had one file of layers, `ultralytics.nn.modules`, and `ultralytics.yolo.utils`."""
    for package in (b"conv", b"block", b"head"):
        program = program.replace(b"cultralytics.nn.modules." + package + b"\n", b"cultralytics.nn.modules\n")
    return program.replace(b"cultralytics.utils\n", b"cultralytics.yolo.utils\n")


def test_a_checkpoint_of_ultralytics_8_0_0_is_the_same_model(tmp_path: Path) -> None:
    net = train_checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)
    torch.save({"model": net, "ema": None, "train_args": vars(get_cfg())}, tmp_path / "now.pt")
    old = repickled(tmp_path / "now.pt", tmp_path / "old.pt", as_8_0_0)
    with zipfile.ZipFile(old) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert b"cultralytics.nn.modules\nDetect\n" in program and b"cultralytics.nn.modules." not in program
    assert b"cultralytics.yolo.utils\nIterableSimpleNamespace\n" in program
    loaded = train_checkpoint.load_model(old)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in net.state_dict().items())


def test_a_checkpoint_of_8_0_200_with_its_criterion_is_the_same_model(tmp_path: Path) -> None:
    """Its trainer left the loss on the model: classes of `ultralytics.utils` with tensors of their own."""
    net = train_checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)
    net.criterion = net.init_criterion()
    torch.save({"model": deepcopy(net).half(), "ema": None, "train_args": {}}, tmp_path / "m.pt")
    loaded = train_checkpoint.load_model(tmp_path / "m.pt")
    assert type(loaded.criterion).__name__ == "v8DetectionLoss"
    assert all(
        torch.equal(value.half().float(), loaded.state_dict()[key].float()) for key, value in net.state_dict().items()
    )


class Own(nn.Module):
    """A layer of somebody's own code."""


FORMS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a state_dict": (lambda net: net.state_dict(), "it contains no model, only tensors or settings"),
    "a state_dict under model": (lambda net: {"model": net.state_dict()}, "it contains no model, only tensors or settings"),
    "a model in DataParallel": (lambda net: {"model": nn.DataParallel(net)}, "its model is inside DataParallel"),
    "DataParallel alone": (nn.DataParallel, "its model is inside DataParallel"),
    "tensors of DataParallel": (lambda net: nn.DataParallel(net).state_dict(), "only tensors named module.NAME"),
    "those under model": (lambda net: {"model": nn.DataParallel(net).state_dict()}, "only tensors named module.NAME"),
    "the bare module": (lambda net: net, "it contains no dictionary; save it with Ultralytics' model.save"),
    "a list of models": (lambda net: [net], "it contains no dictionary"),
    "own code": (lambda net: {"model": nn.Sequential(net, Own())}, f"'{Own.__module__}.Own', which no YOLO checkpoint holds"),
    "names in no order": (lambda net: {"model": _named(net, {0: "bolt", 2: "nut"})}, "not numbered from 0"),
    "names by text": (lambda net: {"model": _named(net, {"0": "bolt", "1": "nut"})}, "not numbered from 0"),
    "one name": (lambda net: {"model": _named(net, "bolt")}, "scores an anchor for 4 class names"),
    "no names": (lambda net: {"model": _named(net, {})}, "scores an anchor for 0 class names"),
    "names None": (lambda net: {"model": _named(net, None)}, "not a loadable YOLO checkpoint"),
    "nothing": (lambda net: {}, "it contains no model"),
    "None": (lambda net: None, "it contains no dictionary"),
}  # fmt: skip


def _named(net: Any, names: Any) -> Any:
    net.names = names
    return net


@pytest.mark.parametrize("form", FORMS)
def test_another_form_is_refused_by_its_name(form: str, tmp_path: Path) -> None:
    make, says = FORMS[form]
    torch.save(make(train_checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)), tmp_path / "m.pt")
    with pytest.raises(CompressError) as caught:
        train_checkpoint.load_model(tmp_path / "m.pt")
    assert says in str(caught.value) and caught.value.exit_code in (2, 5)


@pytest.mark.parametrize(
    "form", [name for name, (_, says) in FORMS.items() if "DataParallel" in says or "module." in says]
)
def test_what_the_message_of_dataparallel_says_loads(form: str, tmp_path: Path) -> None:
    net = train_checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)
    torch.save(FORMS[form][0](net), tmp_path / "m.pt")
    with pytest.raises(CorruptArtifact) as caught:
        train_checkpoint.load_model(tmp_path / "m.pt")
    remedy = str(caught.value).rpartition("save the model inside: ")[2]
    exec(remedy.replace("FILE.pt", str(tmp_path / "other.pt")), {"torch": torch, "model": nn.DataParallel(net)})
    loaded = train_checkpoint.load_model(tmp_path / "other.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())


def test_a_whole_yolo_object_is_refused_by_its_name(tmp_path: Path) -> None:
    from ultralytics import YOLO

    torch.save(YOLO("yolov8n.yaml"), tmp_path / "m.pt")
    with pytest.raises(CorruptArtifact, match=r"'ultralytics\.models\.yolo\.model\.YOLO'"):
        train_checkpoint.load_model(tmp_path / "m.pt")


SOUND: dict[str, tuple[Callable[[Any], Any], str]] = {
    "ema only": (lambda net: {"model": None, "ema": net}, "m.pt"),
    "no ema": (lambda net: {"model": net}, "m.pt"),
    "train_args None": (lambda net: {"model": net, "train_args": None}, "m.pt"),
    "a list of names": (lambda net: {"model": _named(net, ["bolt", "nut"])}, "m.pt"),
    "names out of order": (lambda net: {"model": _named(net, {1: "nut", 0: "bolt"})}, "m.pt"),
    "another suffix": (lambda net: {"model": net}, "m.pth"),
    "no suffix": (lambda net: {"model": net}, "m"),
    "upper case": (lambda net: {"model": net}, "M.PT"),
}


@pytest.mark.parametrize("form", SOUND)
def test_another_form_that_is_sound_is_the_same_model(form: str, tmp_path: Path) -> None:
    make, name = SOUND[form]
    net = train_checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)
    torch.save(make(net), tmp_path / name)
    loaded = train_checkpoint.load_model(tmp_path / name)
    assert loaded.names == {0: "bolt", 1: "nut"}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in net.state_dict().items())
