"""The command line: one row a verb in `verbs`, one file a verb that is more than a stage."""
