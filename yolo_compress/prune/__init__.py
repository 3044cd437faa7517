"""Channel pruning of YOLOv8: dependency groups, importance, budget, surgery, recovery."""
