"""The command line: one row a verb in `verbs`, one file a verb with its handler."""
