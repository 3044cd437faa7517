"""Charts as inline SVG, one file each."""
