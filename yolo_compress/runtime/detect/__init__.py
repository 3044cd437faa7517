"""From an image to detections: sources of images, letterbox, engine, NMS, and drawing."""
