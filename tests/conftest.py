"""Every test sees ultralytics as the package does: hardened before its first import."""

from yolo_compress.hardening import harden

harden()
