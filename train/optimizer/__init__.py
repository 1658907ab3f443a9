"""The optimizer: weights, moments and average in flat tensors, shared out among the processes."""
