"""Make the bundle for a robot: its files, its golden self-test and its signature. The code in a bundle is `yolo_compress.runtime`."""
