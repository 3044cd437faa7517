"""Data sets: the data yaml, the preflight of every image and label, its cache, and the built-in digits."""
