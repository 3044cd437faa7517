"""The exported graph has the outputs of the model, equal bytes each time, and loads in Ultralytics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ultralytics.nn.modules import DFL

from tests.support.given import find
from tests.support.quant_net import NAMES, SIZE, images, net, run_onnx, run_torch
from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.export.float_onnx import export_onnx, export_torchscript
from yolo_compress.export.qdq import find_convs
from yolo_compress.nets.detect import Expectation
from yolo_compress.quant.plan import plan


def assert_same(got: np.ndarray, expected: np.ndarray, factor: float = 1.0) -> None:
    assert got.shape == expected.shape and got.dtype == np.float32
    assert (
        np.abs(got - expected)[:, :4].max() <= 0.05 * factor
    )  # random weights spread DFL over all bins, which causes more rounding than in a trained model
    assert np.abs(got - expected)[:, 4:].max() <= 1e-4 * factor


@pytest.mark.parametrize(
    ("yaml", "size", "opset"),
    [("yolov8n", SIZE, 17), ("yolov8n", (64, 96), 13), ("yolov8n-p2", SIZE, 17), ("yolov8n-p6", (128, 64), 17)],
)
def test_onnx_gives_what_torch_gives(tmp_path: Path, yaml: str, size: tuple[int, int], opset: int) -> None:
    model, batch = net(yaml=f"{yaml}.yaml"), images(3, size=size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path / "a.onnx", size, names=NAMES, opset=opset)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    expected = run_torch(model, batch)
    assert expected[:, 4:].std() > 0.1  # the outputs are not constant
    got = run_onnx(tmp_path / "a.onnx", batch)
    if yaml.endswith("p6"):  # larger boxes, more layers: torch itself rounds more
        exact = run_torch(net(yaml=f"{yaml}.yaml").double(), batch.double())
        rounding = np.abs(expected - exact)[:, :4].max()
        assert rounding <= 0.2 and np.abs(got - exact)[:, :4].max() <= 3 * rounding
        assert np.abs(got - expected)[:, 4:].max() <= 4e-4
    else:
        assert_same(got, expected)
    graph = onnx.load(str(tmp_path / "a.onnx"))
    slices = [node.name for node in graph.graph.node if node.op_type == "Slice"]
    assert all(f"/model.{len(model.model) - 1}/" in name for name in slices), "a Split makes halves, and keeps INT8"
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", opset)]
    assert graph.ir_version <= 10
    assert set(find_convs(graph.graph, plan(model).convs)) == set(plan(model).convs)


@pytest.mark.slow
def test_same_network_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_onnx(net(), tmp_path / f"{name}.onnx", SIZE, names=NAMES)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a.onnx").read_bytes()


def test_open_batch_and_no_simplifier(tmp_path: Path) -> None:
    model, batch = net(), images(5)
    export_onnx(model, tmp_path / "a.onnx", SIZE, names=NAMES, dynamic_batch=True, simplify=False)
    graph = onnx.load(str(tmp_path / "a.onnx")).graph
    shapes = [[d.dim_param or d.dim_value for d in item.type.tensor_type.shape.dim] for item in graph.input]
    assert shapes == [["batch", 3, 64, 64]]
    assert_same(run_onnx(tmp_path / "a.onnx", batch), run_torch(model, batch))


@pytest.mark.fault(77)
def test_fixed_batch(tmp_path: Path) -> None:
    model, batch = net(), images(4)
    export_onnx(model, tmp_path / "a.onnx", SIZE, names=NAMES, batch=2)
    assert_same(run_onnx(tmp_path / "a.onnx", batch), run_torch(model, batch))


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:FutureWarning")  # Ultralytics calls it
@pytest.mark.slow
def test_ultralytics_loads_both_forms(tmp_path: Path) -> None:
    from ultralytics.nn.autobackend import AutoBackend

    model, batch = net(), images(1)
    export_onnx(model, tmp_path / "a.onnx", SIZE, names=NAMES)
    export_torchscript(model, tmp_path / "a.torchscript", SIZE, names=NAMES)
    for name in ("a.onnx", "a.torchscript"):
        backend = AutoBackend(str(tmp_path / name), device=torch.device("cpu"))
        assert backend.names == dict(enumerate(NAMES))
        assert (backend.task, backend.stride, backend.batch, list(backend.imgsz)) == ("detect", 32, 1, [64, 64])
        output = backend(batch)
        output = output[0] if isinstance(output, (list, tuple)) else output
        assert_same(np.asarray(output).reshape(1, 7, -1), run_torch(model, batch))


def test_unsupported_exports_are_refused(tmp_path: Path) -> None:
    model, out = net(), tmp_path / "a.onnx"
    with pytest.raises(RecipeError, match="100x64.*stride 32"):
        export_onnx(model, out, (100, 64), names=NAMES)
    with pytest.raises(RecipeError, match=r"export\.opset=12"):
        export_onnx(model, out, SIZE, names=NAMES, opset=12)
    with pytest.raises(RecipeError, match="2 class names.*3 classes"):
        export_onnx(model, out, SIZE, names=NAMES[:2])
    model.model[4].cv1.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.4\.cv1\.conv\.weight"):
        export_onnx(model, out, SIZE, names=NAMES)
    assert not out.exists()


@pytest.mark.real
def test_real_weights_on_16_real_images(tmp_path: Path) -> None:
    from yolo_compress.runtime.detect.pre import letterbox, read_image
    from yolo_compress.train import checkpoint

    model = checkpoint.load_model(find("YOLO_COMPRESS_WEIGHTS", "yolov8n_bccd.pt"))
    files = sorted(find("YOLO_COMPRESS_DATA", "bccd/images/val").iterdir())[:16]
    batch = torch.from_numpy(np.stack([letterbox(read_image(file), (320, 320))[0] for file in files]))
    export_onnx(model, tmp_path / "a.onnx", (320, 320), names=tuple(model.names.values()))
    assert_same(run_onnx(tmp_path / "a.onnx", batch, optimise=True), run_torch(model, batch), factor=0.2)


@pytest.mark.parametrize("reg_max", [4, 16])
def test_expectation_is_dfl(reg_max: int) -> None:
    torch.manual_seed(0)
    sides = 20 * torch.randn(2, 4 * reg_max, 33)  # bins far apart: exponentials must not overflow
    assert torch.allclose(Expectation(reg_max)(sides), DFL(reg_max)(sides), atol=1e-5, rtol=1e-6)
