"""Architectures of detectors: one file per family, a registry of families (`families`), and parts that families share."""

from yolo_compress.nets.hardening import harden

harden()  # before any module here imports ultralytics
