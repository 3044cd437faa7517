"""The command line `yolo-compress`. `verbs` has a table of the verbs, and `cli/<verb>.py` has the function for each."""
