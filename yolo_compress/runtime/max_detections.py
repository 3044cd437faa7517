"""Maximum numbers of detections: in an image after NMS, and in the mAP."""

MAX_DETECTIONS = 100  # detections per class and image that mAP counts: COCO's limit
MAX_DET = 300  # detections per image after NMS


def counted(max_det: int) -> int:
    """Return the number of detections per class and image that mAP counts: COCO's 100, or `max_det` if that is above `MAX_DET`."""
    return MAX_DETECTIONS if max_det <= MAX_DET else max_det
