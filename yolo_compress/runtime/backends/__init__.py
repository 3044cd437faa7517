"""Backends run engines: one file or folder for each runtime. Each backend implements the protocol `Backend` (base.py)."""
