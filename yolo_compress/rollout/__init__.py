"""Staged rollout: shadow logs of two models, statistical tests that are valid at every look, and the state of the release."""
