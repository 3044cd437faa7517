"""Isaac ROS: `isaac_ros_tensor_rt` runs the engine, and `isaac_ros_yolov8` decodes its output.

The decoder (yolov8_decoder_node.cpp, releases 2.1 to 4.4) always reads 8400 anchors in float32, with rows x, y, w, h and the classes.
The decoder does NMS itself. So the model must have 640x640 px, a batch of 1 and no NMS in the graph. If `num_classes` is not set, the
decoder reads 80 classes. NVIDIA's own launch files do not set `num_classes`. If the model has fewer than 80 classes, the decoder then
reads past the end of the tensor.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from yolo_compress.bundle.network_io import Network, require
from yolo_compress.errors import RecipeError
from yolo_compress.runtime.secure.signed_manifest import Versioned

FOLDER = "isaac_ros"
PARAMETERS, LAUNCH = "parameters.yaml", "yolov8.launch.py"
SIDE_PX, ANCHORS = 640, 8400
NODES = {
    "tensor_rt": ("isaac_ros_tensor_rt", "nvidia::isaac_ros::dnn_inference::TensorRTNode"),
    "yolov8_decoder_node": ("isaac_ros_yolov8", "nvidia::isaac_ros::yolov8::YoloV8DecoderNode"),
}
_ARGUMENTS = {
    "input_image_width": "1280",
    "input_image_height": "720",
    "image_input_topic": "/image_rect",
    "camera_info_input_topic": "/camera_info_rect",
}
_ENCODER = {
    "network_image_width": str(SIDE_PX),
    "network_image_height": str(SIDE_PX),
    "image_mean": "[0.0, 0.0, 0.0]",  # as in NVIDIA's launch file of YOLOv8: values from 0 to 1
    "image_stddev": "[1.0, 1.0, 1.0]",
    "input_encoding": "rgb8",
    "attach_to_shared_component_container": "True",
    "dnn_image_encoder_namespace": "yolov8_encoder",
    "tensor_output_topic": "/tensor_pub",
    "tensor_name": "input_tensor",
}
_LAUNCH = '''"""Camera image -> isaac_ros_dnn_image_encoder -> TensorRT -> YOLOv8 decoder -> /detections_output.

PYTHONDONTWRITEBYTECODE=1 ros2 launch yolov8.launch.py input_image_width:=1280 input_image_height:=720 image_input_topic:=/image_rect

Boxes come out in px of the encoded {side}x{side} image. `python3 build.py --runtime tensorrt` makes the engine that is loaded.
"""

import os

import yaml
from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import ComposableNodeContainer
from launch_ros.descriptions import ComposableNode

HERE = os.path.dirname(os.path.abspath(__file__))
CONTAINER = "yolov8_container"
NODES = {nodes}
ARGUMENTS = {arguments}
ENCODER = {encoder}


def generate_launch_description():
    with open(os.path.join(HERE, "{parameters}"), encoding="utf-8") as stream:
        settings = {{name: node["ros__parameters"] for name, node in yaml.safe_load(stream).items()}}
    for key in ("model_file_path", "engine_file_path"):
        settings["tensor_rt"][key] = os.path.normpath(os.path.join(HERE, settings["tensor_rt"][key]))
    nodes = [
        ComposableNode(name=name, package=package, plugin=plugin, parameters=[settings[name]])
        for name, (package, plugin) in NODES.items()
    ]
    package = get_package_share_directory("isaac_ros_dnn_image_encoder")
    encoder = os.path.join(package, "launch", "dnn_image_encoder.launch.py")
    encoding = dict(ENCODER, component_container_name=CONTAINER)
    encoding.update((name, LaunchConfiguration(name)) for name in ARGUMENTS)
    return LaunchDescription(
        [DeclareLaunchArgument(name, default_value=value) for name, value in ARGUMENTS.items()]
        + [
            ComposableNodeContainer(
                name=CONTAINER,
                namespace="",
                package="rclcpp_components",
                executable="component_container_mt",
                composable_node_descriptions=nodes,
                output="screen",
            ),
            IncludeLaunchDescription(PythonLaunchDescriptionSource(encoder), launch_arguments=encoding.items()),
        ]
    )
'''


def write(directory: Path, network: Network, about: Versioned, precision: str) -> list[str]:
    """Write the parameters of the two ROS nodes, and the launch file that starts them. Return the written files.

    Raises:
        RecipeError: The decoder cannot read the model's output.
    """
    _check_contract(network, len(about["names"]))
    parameters = {
        "tensor_rt": {
            "model_file_path": f"../{network.path.relative_to(directory).as_posix()}",
            "engine_file_path": f"../engines/tensorrt-{precision}/engine.plan",
            "input_tensor_names": [_ENCODER["tensor_name"]],
            "input_binding_names": [network.input.name],
            "output_tensor_names": ["output_tensor"],
            "output_binding_names": [network.output.name],
            "verbose": False,
            "force_engine_update": False,
        },
        "yolov8_decoder_node": {
            "tensor_name": "output_tensor",
            "confidence_threshold": 0.25,
            "nms_threshold": network.iou,
            "num_classes": len(about["names"]),
        },
    }
    folder = directory / FOLDER
    folder.mkdir()
    document = {name: {"ros__parameters": values} for name, values in parameters.items()}
    (folder / PARAMETERS).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    launch = _LAUNCH.format(side=SIDE_PX, nodes=NODES, arguments=_ARGUMENTS, encoder=_ENCODER, parameters=PARAMETERS)
    (folder / LAUNCH).write_text(launch, encoding="utf-8")
    return [f"{FOLDER}/{PARAMETERS}", f"{FOLDER}/{LAUNCH}"]


def _check_contract(network: Network, classes: int) -> None:
    wanted = (("images", "FLOAT", (1, 3, SIDE_PX, SIDE_PX)), ("output0", "FLOAT", (1, 4 + classes, ANCHORS)))
    for tensor, (name, kind, shape) in zip((network.input, network.output), wanted, strict=True):
        if (tensor.name, tensor.kind, tensor.shape) != (name, kind, shape):
            raise RecipeError(
                f"target isaac_ros: {network.path.name} has {tensor.name} {list(tensor.shape)} {tensor.kind.lower()}, expected {name} "
                f"{list(shape)} float: NVIDIA's decoder reads {ANCHORS} anchors of one {SIDE_PX}x{SIDE_PX} px RGB "
                f"image; train and export with data.imgsz={SIDE_PX}, without `channels: 1` in the data yaml, or use target=plain, "
                "deepstream or triton"
            )
    if network.nms:
        raise RecipeError(
            f"target isaac_ros: {network.path.name} has NMS in its graph, but the decoder does NMS itself"
        )


def check(directory: Path, network: Network, about: Versioned) -> None:
    """Read the parameters back, and compare them with the model.

    Raises:
        RecipeError: A value differs.
    """
    _check_contract(network, len(about["names"]))
    path = directory / FOLDER / PARAMETERS
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs, reads = (document[name]["ros__parameters"] for name in NODES)
    require(path, runs["input_binding_names"], [network.input.name], "input_binding_names")
    require(path, runs["output_binding_names"], [network.output.name], "output_binding_names")
    require(path, reads["tensor_name"], runs["output_tensor_names"][0], "tensor_name")
    require(path, runs["input_tensor_names"], [_ENCODER["tensor_name"]], "input_tensor_names")
    require(path, reads["nms_threshold"], network.iou, "nms_threshold")
    require(path, reads["num_classes"], network.output.shape[1] - 4, "num_classes")
    require(path, (path.parent / runs["model_file_path"]).resolve(), network.path.resolve(), "model_file_path")
