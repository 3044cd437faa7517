"""Everything that uses Ultralytics' training code: load and save checkpoints, train with hooks, and validate."""

from yolo_compress.nets.hardening import harden

harden()  # before any module of this package imports ultralytics
