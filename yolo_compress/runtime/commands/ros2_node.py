"""`python3 ros2_node.py`: a ROS 2 node that turns images into detections.

It reads sensor_msgs/Image from `image` and publishes vision_msgs/Detection2DArray on `detections`, with boxes in px of the image.
It needs ROS 2 Humble or later (vision_msgs 4). Parameters: engine (folder in engines/), conf, iou, shadow (log file for rollout).
It never ran on a robot. The tests use stand-ins for rclpy and the messages.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, List, Optional, Sequence

import numpy as np

from ..detect.detector import Detector
from ..detect.stream import ImageDetections
from ..engine import open_engine
from ..errors import EngineError, NotFinite, RuntimeUnavailable
from .bundle import HERE, engine_folder, open_bundle, outside
from .command_line import run_command, say
from .detect import ShadowLog

CHANNELS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0), "mono8": (0, 0, 0)}
_BYTES = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}


def to_rgb(message: Any) -> np.ndarray:
    """Convert a sensor_msgs/Image to an (H, W, 3) uint8 RGB array. Rows may be padded (`step`).

    Raises:
        ValueError: the encoding is not in `CHANNELS`, or there are fewer bytes than the message states.
    """
    if message.encoding not in CHANNELS:
        raise ValueError(f"encoding {message.encoding!r}, expected one of {', '.join(CHANNELS)}")
    bytes_px = _BYTES[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.frombuffer(message.data, np.uint8)
    if height < 1 or width < 1 or step < width * bytes_px or len(data) < height * step:
        raise ValueError(f"{len(data)} bytes in rows of {step} are no {width}x{height} px {message.encoding} image")
    pixels = data[: height * step].reshape(height, step)[:, : width * bytes_px].reshape(height, width, bytes_px)
    return np.ascontiguousarray(pixels[..., list(CHANNELS[message.encoding])])


def to_message(detections_N6: np.ndarray, names: Sequence[str], header: Any, kinds: Any) -> Any:
    """Convert detections to a Detection2DArray: centre and size in px, and the class by name.

    Args:
        detections_N6: (N, 6) array, columns x1, y1, x2, y2 in px, score, class.
        names: class names in the order of their index.
        header: header of the image, which becomes the header of the result.
        kinds: the module vision_msgs.msg.
    """
    array = kinds.Detection2DArray()
    array.header = header
    detections: List[Any] = []
    for x1, y1, x2, y2, score, label in detections_N6.tolist():
        hypothesis = kinds.ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id = names[int(label)]
        hypothesis.hypothesis.score = score
        detection = kinds.Detection2D()
        detection.header = header
        detection.bbox.center.position.x = (x1 + x2) / 2
        detection.bbox.center.position.y = (y1 + y2) / 2
        detection.bbox.size_x = x2 - x1
        detection.bbox.size_y = y2 - y1
        detection.results = [hypothesis]
        detections.append(detection)
    array.detections = detections
    return array


def main(argv: Optional[Sequence[str]] = None, directory: Path = HERE) -> int:
    """Verify the bundle, run the node until ROS shuts down, and return the exit code."""
    return run_command(lambda: _spin(directory, argv))


def _spin(directory: Path, argv: Optional[Sequence[str]]) -> int:
    bundle = open_bundle(directory)
    try:
        import rclpy
        from rclpy.executors import ExternalShutdownException
        from rclpy.qos import qos_profile_sensor_data
        from sensor_msgs.msg import Image
        from vision_msgs import msg as kinds
    except ImportError as error:
        raise RuntimeUnavailable(
            f"ROS 2 cannot be imported ({error})",
            "source /opt/ros/DISTRO/setup.bash and install ros-DISTRO-vision-msgs",
        ) from error
    rclpy.init(args=argv)
    node = rclpy.create_node("yolo_compress")
    try:
        given = {
            name: node.declare_parameter(name, default).value
            for name, default in (("engine", ""), ("conf", 0.25), ("iou", 0.7), ("shadow", ""))
        }
        if given["shadow"]:
            outside(bundle, Path(str(given["shadow"])), "shadow")
        for name in ("conf", "iou"):
            if not 0 <= float(given[name]) <= 1:
                raise EngineError(f"parameter {name}: got {given[name]}, expected a number from 0 to 1")
        folder = engine_folder(bundle, given["engine"] or None)
        log = ShadowLog(Path(str(given["shadow"])), bundle) if given["shadow"] else nullcontext()
        with log as shadow, open_engine(folder) as engine:
            detector = Detector(engine, float(given["conf"]), float(given["iou"]), bundle.max_det, False)
            publisher = node.create_publisher(kinds.Detection2DArray, "detections", 10)
            count = [0]

            def on_image(message: Any) -> None:
                start, problem = time.perf_counter(), None
                detections_N6 = np.zeros((0, 6), np.float32)
                try:
                    detections_N6 = detector(to_rgb(message))
                    publisher.publish(to_message(detections_N6, bundle.names, message.header, kinds))
                except (ValueError, NotFinite) as error:  # only this frame is lost
                    problem = str(error)
                    node.get_logger().error(problem)
                count[0] += 1
                if shadow is not None:
                    stamp = message.header.stamp
                    name = f"{message.header.frame_id}@{stamp.sec}.{stamp.nanosec:09d}"
                    ms = (time.perf_counter() - start) * 1e3
                    shadow.write(ImageDetections(name, None, detections_N6, problem, ms))

            node.create_subscription(Image, "image", on_image, qos_profile_sensor_data)
            say(f"{bundle.name} {bundle.version}, engine {folder.name}: image -> detections")
            try:
                rclpy.spin(node)
            except ExternalShutdownException:  # a launch file sends SIGTERM
                pass
            say(f"{count[0]} images")
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return 0
