"""Distillation: losses as pure functions of tensors (feature.py, logits.py), outputs of named layers (taps.py), teachers
(teacher.py), checks that every loss term has an effect (checks.py), images without data (inversion.py), the hook (hook.py)."""
