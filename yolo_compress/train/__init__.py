"""The only door to ultralytics' engine: checkpoints in and out, one training loop with hooks, its own validator."""

from yolo_compress.nets.hardening import harden

harden()  # before any module of this package imports ultralytics
