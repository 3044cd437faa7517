"""From an image to detections: letterbox, engine, NMS; sources of images and drawings."""
