"""The bundle for a robot: what it holds, how it is proved and signed. The code it carries is `yolo_compress.runtime`."""
