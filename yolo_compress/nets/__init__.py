"""What a detector is made of: one file a family, one registry (`families`), and what several families share."""

from yolo_compress.nets.hardening import harden

harden()  # before any module here imports ultralytics
