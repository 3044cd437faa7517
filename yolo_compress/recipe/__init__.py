"""Define the sections and knobs of a recipe, read recipe files, and check them as far as possible without data."""
