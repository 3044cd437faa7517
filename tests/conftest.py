"""Every test sees ultralytics as the package does, hardened before its first import, and writes to no folder but its own."""

import os

from yolo_compress.hardening import harden

harden()
os.environ.pop("YOLO_COMPRESS_HOME", None)
