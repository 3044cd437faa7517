"""Data sets: read the data yaml, check every image and label (preflight), cache the result, and draw the built-in digits."""
