"""Staged rollout: shadow logs of two models, statistical tests that stay valid if repeated, and the state of the release."""
