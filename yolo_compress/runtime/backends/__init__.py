"""Backends: one file or folder for each runtime. Each implements `Backend` (base.py)."""
