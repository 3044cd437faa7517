"""One file or folder a runtime, each a `Backend` (base.py)."""
