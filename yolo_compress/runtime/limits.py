"""Limits of the number of detections per image."""

MAX_DETECTIONS = 100  # detections per class and image that mAP counts: COCO's limit
MAX_DET = 300  # detections per image after NMS


def counted(max_det: int) -> int:
    """Return the number of detections per class and image that mAP counts: COCO's 100, or `max_det` if it is above the default."""
    return MAX_DETECTIONS if max_det <= MAX_DET else max_det
