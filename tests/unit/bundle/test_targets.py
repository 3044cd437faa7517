"""The files for servers and ROS are written, read back and compared with the model. The ROS 2 node runs with stand-ins."""

from __future__ import annotations

import configparser
import contextlib
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from yolo_compress.bundle.network_io import read
from yolo_compress.bundle.targets import deepstream, isaac_ros, registry, triton
from yolo_compress.errors import RecipeError
from yolo_compress.runtime.commands import ros2_node
from yolo_compress.runtime.errors import NotFinite

NAMES = ["person", "dog", "<b>cat</b>"]


def network(
    path: Path,
    side: int = 640,
    classes: int = 3,
    batch: int | str = 1,
    opset: int = 17,
    nms: bool = False,
    names: tuple[str, str] = ("images", "output0"),
    output_kind: int = TensorProto.FLOAT,
    needs_nms: bool = True,
) -> Path:
    """Write a model with the right names, types and shapes. It returns the same random boxes and scores for every image."""
    anchors = sum((side // stride) ** 2 for stride in (8, 16, 32))
    said = np.random.default_rng(0).random((1, 4 + classes, anchors)).astype(np.float32)
    said[:, :4] *= side
    zero = [
        helper.make_node("ReduceMin", [names[0]], ["least"], axes=[1, 2, 3], keepdims=1)
        if opset < 18
        else helper.make_node("ReduceMin", [names[0], "axes"], ["least"], keepdims=1),
        helper.make_node("Reshape", ["least", "to"], ["flat"]),
        helper.make_node("Mul", ["flat", "nothing"], ["zero"]),
        helper.make_node("Add", ["zero", "said"], ["sum"]),
        helper.make_node("Cast", ["sum"], [names[1]], to=output_kind),
    ]
    held = {
        "said": said,
        "nothing": np.array(0, np.float32),
        "to": np.array([-1, 1, 1], np.int64),
        "axes": np.array([1, 2, 3], np.int64),
    }
    if nms:
        zero.append(helper.make_node("EfficientNMS_TRT", [names[1]], ["kept"], domain="trt"))
    graph = helper.make_graph(
        zero,
        "g",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info(names[1], output_kind, [batch, 4 + classes, anchors])],
        [numpy_helper.from_array(array, name) for name, array in held.items() if name != "axes" or opset >= 18],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("trt", 1)] if nms else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    helper.set_model_props(model, {} if needs_nms else {"needs_nms": "False"})
    onnx.save(model, str(path))
    return path


def bundle(root: Path, int8: bool = True, **how: Any) -> dict[str, Any]:
    """Make the folder of a bundle with its ONNX files. Return the entries of its manifest."""
    stems = ["fp32", *(["int8"] if int8 else [])]
    for stem in stems:
        network(root / "onnx" / f"{stem}.onnx", **how)
    return {"name": "my demo", "version": 7, "names": NAMES, "onnx": {stem: f"onnx/{stem}.onnx" for stem in stems}}


@pytest.mark.parametrize("target", registry.TARGETS)
def test_the_returned_files_are_those_written(tmp_path: Path, target: str) -> None:
    about = bundle(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    files = registry.write(target, tmp_path, about)
    there = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {tmp_path / name for name in files} == there and len(files) == len(set(files))
    registry.check(target, tmp_path, about)
    assert "from runtime.commands.ros2_node import main" in (tmp_path / "ros2_node.py").read_text()


def test_an_unknown_target_is_an_error_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="isaac_ros, deepstream, triton"):
        registry.write("isaac", tmp_path, bundle(tmp_path))


@pytest.mark.parametrize("target", ["deepstream", "triton"])
@pytest.mark.parametrize(("side", "batch", "opset"), [(320, 1, 17), (640, 4, 19), (160, "batch", 13)])
def test_other_sizes_and_batches_are_for_the_servers(
    tmp_path: Path, target: str, side: int, batch: int | str, opset: int
) -> None:
    written = registry.write(target, tmp_path, bundle(tmp_path, side=side, batch=batch, opset=opset))
    assert any(target in file for file in written) and all((tmp_path / file).is_file() for file in written)
    assert str(side) in "".join((tmp_path / file).read_text() for file in written if file.endswith((".txt", ".pbtxt")))


@pytest.mark.parametrize(("needs_nms", "iou"), [(True, 0.7), (False, 1.0)])
def test_the_nms_of_a_server_removes_no_box_of_a_model_that_needs_none(
    tmp_path: Path, needs_nms: bool, iou: float
) -> None:
    about = bundle(tmp_path, needs_nms=needs_nms)
    for target in ("deepstream", "isaac_ros", "triton"):
        registry.write(target, tmp_path, about)
    parsed = configparser.ConfigParser()
    parsed.read_string((tmp_path / "deepstream" / "config_infer_primary.txt").read_text())
    assert float(parsed["class-attrs-all"]["nms-iou-threshold"]) == iou
    said = yaml.safe_load((tmp_path / "isaac_ros" / "parameters.yaml").read_text())
    assert said["yolov8_decoder_node"]["ros__parameters"]["nms_threshold"] == iou
    text = (tmp_path / "triton" / "model_repository" / "my_demo" / "config.pbtxt").read_text()
    assert ("scores; no NMS." if needs_nms else "scores; NMS is not needed.") in text


# Isaac ROS


def test_the_parameters_of_isaac_ros_have_names_and_classes(tmp_path: Path) -> None:
    registry.write("isaac_ros", tmp_path, bundle(tmp_path))
    said = yaml.safe_load((tmp_path / "isaac_ros" / "parameters.yaml").read_text())
    runs, reads = said["tensor_rt"]["ros__parameters"], said["yolov8_decoder_node"]["ros__parameters"]
    assert (runs["input_binding_names"], runs["output_binding_names"]) == (["images"], ["output0"])
    assert runs["engine_file_path"] == "../engines/tensorrt-int8/engine.plan"
    assert (reads["num_classes"], reads["tensor_name"]) == (3, "output_tensor")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"side": 320}, r"images \[1, 3, 320, 320\]"),
        ({"batch": 2}, r"images \[2, 3, 640, 640\]"),
        ({"batch": "batch"}, r"images \[-1, 3, 640, 640\]"),
        ({"classes": 4}, r"output0 \[1, 8, 8400\]"),
        ({"nms": True}, "NMS in its graph"),
        ({"names": ("input", "output0")}, r"input \[1, 3, 640, 640\]"),
        ({"output_kind": TensorProto.FLOAT16}, "float16"),
    ],
)
def test_isaac_ros_refuses_models_that_its_decoder_cannot_read(tmp_path: Path, how: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        registry.write("isaac_ros", tmp_path, bundle(tmp_path, int8=False, **how))
    assert not (tmp_path / "isaac_ros").exists()


def stand_in(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


class Noted:
    """A launch action that stores its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def test_the_launch_file_describes_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for launch and launch_ros record the nodes, their parameters with absolute paths, and the encoder's arguments."""
    registry.write("isaac_ros", tmp_path, bundle(tmp_path))
    made = {
        name: type(name, (Noted,), {}) for name in ("ComposableNode", "ComposableNodeContainer", "LaunchDescription")
    }
    made |= {name: type(name, (Noted,), {}) for name in ("DeclareLaunchArgument", "IncludeLaunchDescription")}
    made |= {name: type(name, (Noted,), {}) for name in ("PythonLaunchDescriptionSource", "LaunchConfiguration")}
    modules = {
        "ament_index_python": {},
        "ament_index_python.packages": {"get_package_share_directory": lambda name: f"/opt/ros/{name}"},
        "launch": {"LaunchDescription": made["LaunchDescription"]},
        "launch.actions": {name: made[name] for name in ("DeclareLaunchArgument", "IncludeLaunchDescription")},
        "launch.launch_description_sources": {"PythonLaunchDescriptionSource": made["PythonLaunchDescriptionSource"]},
        "launch.substitutions": {"LaunchConfiguration": made["LaunchConfiguration"]},
        "launch_ros": {},
        "launch_ros.actions": {"ComposableNodeContainer": made["ComposableNodeContainer"]},
        "launch_ros.descriptions": {"ComposableNode": made["ComposableNode"]},
    }
    for name, attributes in modules.items():
        monkeypatch.setitem(sys.modules, name, stand_in(name, **attributes))
    launch = runpy.run_path(str(tmp_path / "isaac_ros" / "yolov8.launch.py"))["generate_launch_description"]()
    *declared, container, encoder = launch.args[0]
    assert [one.args[0] for one in declared] == list(isaac_ros._ARGUMENTS)
    nodes = {node.kwargs["name"]: node.kwargs for node in container.kwargs["composable_node_descriptions"]}
    assert {name: (node["package"], node["plugin"]) for name, node in nodes.items()} == isaac_ros.NODES
    assert nodes["tensor_rt"]["parameters"][0]["model_file_path"] == str(tmp_path / "onnx" / "fp32.onnx")
    assert nodes["yolov8_decoder_node"]["parameters"][0]["num_classes"] == 3
    encoding = dict(encoder.kwargs["launch_arguments"])
    assert (encoding["network_image_width"], encoding["tensor_output_topic"]) == ("640", "/tensor_pub")
    assert encoding["component_container_name"] == container.kwargs["name"]


# DeepStream


@pytest.mark.parametrize(("batch", "opset"), [(1, 13), ("batch", 17), (2, 19)])
def test_deepstreams_rows_are_the_networks_boxes(tmp_path: Path, batch: int | str, opset: int) -> None:
    network(tmp_path / "a.onnx", side=64, batch=batch, opset=opset)
    deepstream.rows(read(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    images = np.zeros((2 if batch == 2 or batch == "batch" else 1, 3, 64, 64), np.float32)

    def run(path: Path) -> np.ndarray:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        answer: np.ndarray = session.run(None, {"images": images})[0]
        return answer

    output_BCA, rows_BA6 = run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx")
    boxes_BA4, scores_BAK = np.moveaxis(output_BCA[:, :4], 1, 2), np.moveaxis(output_BCA[:, 4:], 1, 2)
    low, high = boxes_BA4[..., :2] - boxes_BA4[..., 2:] / 2, boxes_BA4[..., :2] + boxes_BA4[..., 2:] / 2
    expected = [low, high, scores_BAK.max(2, keepdims=True), scores_BAK.argmax(2)[..., None].astype(np.float32)]
    assert rows_BA6.shape == (len(images), 84, 6) and rows_BA6.dtype == np.float32
    np.testing.assert_allclose(rows_BA6, np.concatenate(expected, 2), rtol=0, atol=1e-5)


def test_the_configuration_of_deepstream_has_what_nvinfer_needs(tmp_path: Path) -> None:
    registry.write("deepstream", tmp_path, bundle(tmp_path, side=320))
    text = (tmp_path / "deepstream" / "config_infer_primary.txt").read_text()
    parsed = configparser.ConfigParser()
    parsed.read_string(text)
    said = parsed["property"]
    assert float(said["net-scale-factor"]) == pytest.approx(1 / 255, abs=1e-12)
    assert (said["infer-dims"], said["num-detected-classes"], said["network-mode"]) == ("3;320;320", "3", "2")
    assert (tmp_path / "deepstream" / "labels.txt").read_text().splitlines() == NAMES
    assert "trtexec --onnx=model-int8.onnx --int8 --fp16" in text and "never run" in text
    float_only = tmp_path / "float"
    registry.write("deepstream", float_only, bundle(float_only, int8=False, side=320))
    assert "trtexec" not in (float_only / "deepstream" / "config_infer_primary.txt").read_text()


@pytest.mark.parametrize("name", ["a;b", "a\nb", ""])
def test_deepstream_refuses_a_class_name_that_it_would_split(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="labels.txt"):
        registry.write("deepstream", tmp_path, {**bundle(tmp_path, side=64), "names": ["x", "y", name]})


# Triton


@pytest.mark.parametrize(
    ("batch", "limit", "dims"), [(1, "0", ["1", "3", "320", "320"]), ("batch", "8", ["3", "320", "320"])]
)
def test_the_configuration_of_triton_has_the_shapes(
    tmp_path: Path, batch: int | str, limit: str, dims: list[str]
) -> None:
    registry.write("triton", tmp_path, bundle(tmp_path, side=320, batch=batch))
    folder = tmp_path / "triton" / "model_repository" / "my_demo"
    said = triton.parse_pbtxt((folder / "config.pbtxt").read_text())
    assert (said["name"], said["backend"], said["max_batch_size"]) == (["my_demo"], ["onnxruntime"], [limit])
    assert said["input"] == [{"name": ["images"], "data_type": ["TYPE_FP32"], "dims": dims}]
    assert said["output"][0]["dims"][-2:] == ["7", "2100"]
    assert (folder / "7" / "model.onnx").read_bytes() == (tmp_path / "onnx" / "fp32.onnx").read_bytes()


# What the checks are for


@pytest.mark.parametrize(
    ("target", "file", "old", "new"),
    [
        ("isaac_ros", "isaac_ros/parameters.yaml", "num_classes: 3", "num_classes: 80"),
        ("isaac_ros", "isaac_ros/parameters.yaml", "- output0", "- output1"),
        ("isaac_ros", "isaac_ros/parameters.yaml", "onnx/fp32", "onnx/fp16"),
        ("deepstream", "deepstream/config_infer_primary.txt", "infer-dims=3;640;640", "infer-dims=3;640;320"),
        ("deepstream", "deepstream/config_infer_primary.txt", "symmetric-padding=1", "symmetric-padding=0"),
        ("deepstream", "deepstream/config_infer_primary.txt", "model-color-format=0", "model-color-format=1"),
        ("deepstream", "deepstream/config_infer_primary.txt", "=0.0039", "=0.0038"),
        ("deepstream", "deepstream/config_infer_primary.txt", "nms-iou-threshold=0.7", "nms-iou-threshold=1.0"),
        ("deepstream", "deepstream/labels.txt", "dog\n", ""),
        ("triton", "triton/model_repository/my_demo/config.pbtxt", "8400", "8401"),
        ("triton", "triton/model_repository/my_demo/config.pbtxt", "TYPE_FP32", "TYPE_FP16"),
        ("triton", "triton/model_repository/my_demo/config.pbtxt", 'name: "my_demo"', 'name: "demo"'),
    ],
)
def test_a_configuration_that_contradicts_the_network_is_found(
    tmp_path: Path, target: str, file: str, old: str, new: str
) -> None:
    about = bundle(tmp_path)
    registry.write(target, tmp_path, about)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(RecipeError, match=Path(file).name if "labels" not in file else "labelfile-path"):
        registry.check(target, tmp_path, about)


def test_a_replaced_model_is_found(tmp_path: Path) -> None:
    for target in ("deepstream", "triton"):
        about = bundle(tmp_path / target, side=64)
        registry.write(target, tmp_path / target, about)
        network(tmp_path / target / "onnx" / "fp32.onnx", side=96)
        with pytest.raises(RecipeError, match="the model has"):
            registry.check(target, tmp_path / target, about)


# The ROS 2 node


def record(**fields: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**fields)


def kinds() -> types.ModuleType:
    """Stand-ins for vision_msgs.msg, version 4, with only the fields of its messages."""

    class Slots:
        def __setattr__(self, key: str, value: Any) -> None:
            assert key in type(self).__annotations__, f"{type(self).__name__} has no {key}"
            object.__setattr__(self, key, value)

    class ObjectHypothesis(Slots):
        class_id: str
        score: float

    class ObjectHypothesisWithPose(Slots):
        hypothesis: Any
        pose: Any

        def __init__(self) -> None:
            self.hypothesis = ObjectHypothesis()

    class Point2D(Slots):
        x: float
        y: float

    class Pose2D(Slots):
        position: Any
        theta: float

        def __init__(self) -> None:
            self.position, self.theta = Point2D(), 0.0

    class BoundingBox2D(Slots):
        center: Any
        size_x: float
        size_y: float

        def __init__(self) -> None:
            self.center = Pose2D()

    class Detection2D(Slots):
        header: Any
        results: Any
        bbox: Any
        id: str

        def __init__(self) -> None:
            self.bbox = BoundingBox2D()

    class Detection2DArray(Slots):
        header: Any
        detections: Any

    return stand_in(
        "vision_msgs.msg",
        ObjectHypothesisWithPose=ObjectHypothesisWithPose,
        Detection2D=Detection2D,
        Detection2DArray=Detection2DArray,
    )


def image(array: np.ndarray, encoding: str, padding: int = 0) -> types.SimpleNamespace:
    height, width = array.shape[:2]
    lines = np.pad(array.reshape(height, -1), ((0, 0), (0, padding)))
    header = record(stamp=record(sec=12, nanosec=34), frame_id="front")
    return record(
        height=height, width=width, step=lines.shape[1], encoding=encoding, data=lines.tobytes(), header=header
    )


@pytest.mark.parametrize("padding", [0, 5])
def test_images_of_each_encoding_become_rgb(padding: int) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    alpha = np.full((7, 5, 1), 9, np.uint8)
    for encoding, array in {
        "rgb8": rgb,
        "bgr8": rgb[..., ::-1],
        "rgba8": np.concatenate([rgb, alpha], 2),
        "bgra8": np.concatenate([rgb[..., ::-1], alpha], 2),
    }.items():
        assert (ros2_node.to_rgb(image(array, encoding, padding)) == rgb).all()
    grey = ros2_node.to_rgb(image(rgb[..., 0], "mono8", padding))
    assert (grey == rgb[..., :1]).all() and grey.shape == rgb.shape


@pytest.mark.parametrize(
    "change", [{"encoding": "yuv422"}, {"height": 8}, {"step": 3}, {"width": 0}, {"data": b""}, {"encoding": "rgba8"}]
)
def test_an_invalid_image_message_is_refused(change: dict[str, Any]) -> None:
    message = image(np.zeros((7, 5, 3), np.uint8), "rgb8")
    with pytest.raises(ValueError, match="expected|are no"):
        ros2_node.to_rgb(record(**{**vars(message), **change}))


class Terminated(Exception):
    """rclpy.executors.ExternalShutdownException."""


class Ros:
    """A stand-in for rclpy. It delivers the given images, and records published messages and log lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, messages: list[Any], given: dict[str, Any]) -> None:
        self.messages, self.given = messages, given
        self.published: list[Any] = []
        self.errors: list[str] = []
        self.callbacks: list[Any] = []
        self.destroyed = False
        for module in (
            stand_in(
                "rclpy",
                init=lambda args: None,
                create_node=lambda name: self,
                spin=self.spin,
                try_shutdown=lambda: None,
            ),
            stand_in("rclpy.executors", ExternalShutdownException=Terminated),
            stand_in("rclpy.qos", qos_profile_sensor_data="sensor data"),
            stand_in("sensor_msgs"),
            stand_in("sensor_msgs.msg", Image=object),
            stand_in("vision_msgs", msg=kinds()),
        ):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def declare_parameter(self, name: str, default: Any) -> Any:
        return record(value=self.given.get(name, default))

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
        assert topic == "detections"
        return record(publish=self.published.append)

    def create_subscription(self, kind: Any, topic: str, callback: Any, qos: Any) -> None:
        assert (topic, qos) == ("image", "sensor data")
        self.callbacks.append(callback)

    def get_logger(self) -> Any:
        return record(error=self.errors.append)

    def destroy_node(self) -> None:
        self.destroyed = True

    def spin(self, node: Any) -> None:
        for message in self.messages:
            self.callbacks[0](message)
        raise Terminated  # as rclpy does at SIGTERM


@pytest.mark.parametrize("full", [False, True])
def test_the_node_publishes_the_detections_of_the_engine(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames are good, not decodable, with NaN outputs, and good again. The test also runs on a full disk."""
    log = Path("/dev/full") if full else tmp_path / "shadow.jsonl"
    good = image(np.full((20, 30, 3), 40, np.uint8), "rgb8")
    poison = image(np.full((20, 30, 3), 255, np.uint8), "rgb8")
    messages = [good, record(**{**vars(good), "encoding": "jpeg"}), poison, good]
    ros = Ros(monkeypatch, messages, {"shadow": str(log), "conf": 0.3})

    def detector(engine: Any, conf: float, iou: float, max_det: int, multi_label: bool) -> Any:
        assert (conf, iou, max_det, multi_label) == (0.3, 0.7, 300, False)

        def detect(image_HW3: np.ndarray) -> np.ndarray:
            if image_HW3[0, 0, 0] == 255:
                raise NotFinite("NaN")
            return np.array([[2, 4, 12, 10, 0.75, 1]], np.float32)

        return detect

    verified = record(names=("person", "dog"), name="demo", version=7, max_det=300, directory=tmp_path / "bundle")
    monkeypatch.setattr(ros2_node, "open_bundle", lambda directory: verified)
    monkeypatch.setattr(ros2_node, "engine_folder", lambda bundle, engine: tmp_path)
    monkeypatch.setattr(ros2_node, "open_engine", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr(ros2_node, "Detector", detector)

    assert ros2_node.main([], tmp_path) == 0
    assert ros.destroyed and len(ros.published) == 2 and len(ros.errors) == 2
    (found,) = ros.published[0].detections
    assert ros.published[0].header is good.header and found.header is good.header
    assert (found.bbox.center.position.x, found.bbox.center.position.y) == (7, 7)
    assert (found.bbox.size_x, found.bbox.size_y) == (10, 6)
    assert (found.results[0].hypothesis.class_id, found.results[0].hypothesis.score) == ("dog", 0.75)
    if full:
        return
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["problem"] is None for line in lines] == [True, False, False, True]
    assert lines[0]["frame"] == "front@12.000000034" and lines[0]["model"] == {"name": "demo", "version": 7}
    assert lines[0]["detections"] == [[2, 4, 12, 10, 0.75, 1]]


@pytest.mark.slow
def test_the_node_runs_a_real_bundles_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.bundled import CONF, make_bundle, pictures
    from yolo_compress.runtime.commands import build
    from yolo_compress.runtime.detect.detector import Detector
    from yolo_compress.runtime.engine import open_engine

    root = make_bundle(tmp_path / "bundle")
    assert build.main(["--runtime", "onnxruntime"], root) == 0
    ros = Ros(monkeypatch, [image(picture, "rgb8", padding=3) for picture in pictures()], {"conf": CONF})
    assert ros2_node.main([], root) == 0
    with open_engine(root / "engines" / "onnxruntime-fp32") as engine:
        expected = [Detector(engine, CONF, 0.7, multi_label=False)(picture) for picture in pictures()]
    assert len(ros.published) == 2 and all(len(rows) for rows in expected)
    for message, rows_N6 in zip(ros.published, expected, strict=True):
        boxes = [found.bbox for found in message.detections]
        got = [[box.center.position.x, box.center.position.y, box.size_x, box.size_y] for box in boxes]
        low, high = rows_N6[:, :2].astype(np.float64), rows_N6[:, 2:4].astype(np.float64)
        np.testing.assert_allclose(got, np.concatenate([(low + high) / 2, high - low], 1), atol=1e-9)
        assert [found.results[0].hypothesis.score for found in message.detections] == rows_N6[:, 4].tolist()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"conf": 1.5}, "parameter conf: got 1.5, expected a number from 0 to 1"),
        ({"shadow": "BUNDLE/log.jsonl"}, "lies in the bundle"),
    ],
)
def test_invalid_parameters_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, Any],
    said: str,
) -> None:
    verified = record(names=("person",), name="demo", version=7, directory=tmp_path)
    monkeypatch.setattr(ros2_node, "open_bundle", lambda directory: verified)
    given = {
        key: str(value).replace("BUNDLE", str(tmp_path)) if key == "shadow" else value for key, value in given.items()
    }
    ros = Ros(monkeypatch, [], given)
    assert ros2_node.main([], tmp_path) == 5
    assert said in capsys.readouterr().err and ros.destroyed


def test_without_ros_the_node_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ros2_node, "open_bundle", lambda directory: None)
    monkeypatch.setitem(sys.modules, "rclpy", None)
    assert ros2_node.main([], tmp_path) == 4
    assert "setup.bash" in capsys.readouterr().err
