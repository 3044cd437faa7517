"""Search for the knobs of prune, distill and qat that keep the most mAP within a latency or size."""
