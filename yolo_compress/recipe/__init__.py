"""The recipe: sections and knobs, the reader of recipe files, and the checks that need no data."""
