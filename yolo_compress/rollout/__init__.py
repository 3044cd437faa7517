"""Grey release: shadow logs of two models, tests that may be looked at any time, and the state of the release."""
