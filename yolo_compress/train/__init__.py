"""All use of Ultralytics' engine: loading and saving checkpoints, one training loop with hooks, and its validator."""

from yolo_compress.nets.hardening import harden

harden()  # before any module of this package imports ultralytics
