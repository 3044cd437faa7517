"""Tables for the terminal, Markdown and HTML."""
