"""Latency, layer times, mAP, golden images, and the state of the device."""
