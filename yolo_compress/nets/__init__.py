"""What a detector is made of: its blocks, and copies and modes of it that several methods need."""
