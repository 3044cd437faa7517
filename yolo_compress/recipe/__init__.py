"""The recipe of a run: its sections and knobs, how a file is read, and the checks that need no data."""
