"""Channel pruning and sparsity: channel groups, importance, budget, removal of channels, recovery, sparse training."""
