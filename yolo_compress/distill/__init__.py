"""Distillation: losses as pure functions of tensors (feature.py, logits.py) and the hook that feeds them (teach.py)."""
