"""Sealed bundles: signature, unpacking, the two slots, and which engines were built here."""
