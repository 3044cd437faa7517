"""Distillation: losses as pure functions of tensors (feature.py, logits.py), taps on layers (taps.py), whom one learns from
(source.py), proof that it is active (proof.py), and the hook that brings them together (teach.py)."""
