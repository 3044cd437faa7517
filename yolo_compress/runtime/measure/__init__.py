"""Measurements on this machine: latency, layer times, mAP, the golden self-test, and the state of the device."""
