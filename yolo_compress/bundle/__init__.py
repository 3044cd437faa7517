"""The bundle for a robot: its files, its golden self-test and its signature. Its code is `yolo_compress.runtime`."""
