"""How many detections of an image count."""

MAX_DETECTIONS = 100  # of a class in an image, best first: COCO's limit
MAX_DET = 300  # of an image, that NMS keeps


def counted(max_det: int) -> int:
    """Detections of a class in an image that mAP counts: COCO's 100, or all that NMS keeps where that was raised."""
    return MAX_DETECTIONS if max_det <= MAX_DET else max_det
